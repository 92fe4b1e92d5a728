"""What a run leaves behind: files by content, and what is refused."""

import importlib.metadata
import json
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from ab_jax.training.records import RunDirectory, describe_run, write_json

CONFIG = {"name": "x", "epochs": 2.0, "learning_rate": 0.1, "clip_norm": None, "tags": ["a", "b"]}
LINES: list[dict[str, Any]] = [
    {"step": 4, "alpha": 0.25, "quantized_accuracy": 0.5, "histogram": [1, 2]},
    {"step": 8, "alpha": 1.0, "quantized_accuracy": 0.75, "histogram": [2, 1]},
]


def open_run(path: Path, **changes: Any) -> RunDirectory:
    return RunDirectory(path, experiment="experiments.mine", config={**CONFIG, **changes})


def read_scalars(path: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step from the TensorBoard events: records of length, CRC, data, CRC."""
    scalars: dict[str, dict[int, float]] = {}
    for file in sorted(path.glob("events.out.tfevents.*")):
        data, start = file.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 12 + length + 4
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_config_holds_every_flag_and_where_it_ran(tmp_path: Path) -> None:
    with open_run(tmp_path / "study" / "seed3"):
        pass
    stored = json.loads((tmp_path / "study" / "seed3" / "config.json").read_text())
    assert stored["config"] == CONFIG
    assert stored["experiment"] == "experiments.mine"
    for package in ("jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        assert stored["packages"][package] == importlib.metadata.version(package)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)", stored["started"])
    assert "8 cpu device(s)" in stored["hardware"]


def test_the_revision_is_the_commit_and_says_whether_files_differ() -> None:
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not in a git checkout")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
    revision = describe_run("experiments.mine", {})["revision"]
    assert revision == head.stdout.strip() + ("-dirty" if changed else "")


def test_metrics_are_lines_and_events(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert run.metrics == []
        for line in LINES:
            run.write_metrics(line)
        assert run.metrics == LINES
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == LINES
    assert text.endswith("\n")
    assert read_scalars(tmp_path) == {
        name: {line["step"]: line[name] for line in LINES}
        for name in ("alpha", "quantized_accuracy")
    }


def test_lines_after_a_checkpoint_are_forgotten(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for line in LINES:
            run.write_metrics(line)
        run.forget_after(7)
        assert run.metrics == LINES[:1]
        run.forget_after(0)
        assert run.metrics == []


def test_record_is_config_metrics_and_summary(tmp_path: Path) -> None:
    summary = {"validation": {"quantized": 0.5}, "test": None, "steps": 8}
    with open_run(tmp_path) as run:
        for line in LINES:
            run.write_metrics(line)
        returned = run.complete(summary)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record == returned
    described = json.loads((tmp_path / "config.json").read_text())
    assert record == {**described, "metrics": LINES, "summary": summary}


def test_a_complete_run_is_not_run_again(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.complete({})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"is complete\. Choose another --name") as error:
        open_run(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_goes_on_with_its_own_flags_alone(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_metrics(LINES[0])
    stored = (tmp_path / "config.json").read_bytes()
    with open_run(tmp_path, tags=("a", "b")) as run:  # JSON has no tuples
        assert run.metrics == LINES[:1]
    with pytest.raises(ValueError, match="was begun with other flags") as error:
        open_run(tmp_path, learning_rate=0.2, clip_norm=1.0)
    assert "--clip_norm was None, is 1.0, --learning_rate was 0.1, is 0.2" in str(error.value)
    assert "--epochs" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == stored


def test_a_run_that_left_no_line_may_begin_anew_with_other_flags(tmp_path: Path) -> None:
    with open_run(tmp_path, learning_rate=-1.0):
        pass  # it stopped over that flag
    with open_run(tmp_path, learning_rate=0.2):
        pass
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["config"] == {**CONFIG, "learning_rate": 0.2}


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, number: float) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": 2, "b": [number]})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
