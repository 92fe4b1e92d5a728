"""What is there of a run that is to be made: flags that came after it are as its code had them."""

import json
from pathlib import Path

import pytest

from experiments.execution.tasks import Task
from experiments.settings.config import FREE_FLAGS, Config, recorded
from experiments.settings.old_flags import ADDED_LATER


@pytest.mark.parametrize("missing", sorted(ADDED_LATER))
def test_a_run_of_before_a_flag_is_done(tmp_path: Path, missing: str) -> None:
    flags = recorded(Config())
    stored = {name: value for name, value in flags.items() if name != missing}
    (tmp_path / "record.json").write_text(json.dumps({"config": stored}))
    task = Task(name="a", directory=tmp_path, command=(), flags=flags)
    assert task.differences() == []
    other = {**flags, missing: "other"}
    was = ADDED_LATER[missing]
    changed = Task(name="a", directory=tmp_path, command=(), flags=other).differences()
    free = missing in FREE_FLAGS
    assert changed == ([] if free else [f"--{missing} was {was!r}, is 'other'"])
