"""The benchmark of streams: a small run of it, and its table."""

import json
from pathlib import Path

import pytest

from benchmarks.loading import Config, run, table

pytestmark = pytest.mark.long


def test_each_loop_is_timed_in_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Binding this process to a core would bind the tests after it.
    monkeypatch.delattr("os.sched_setaffinity", raising=False)
    config = Config(
        image_size=32, batch_size=2, batches=2, rounds=3, out=tmp_path / "new" / "record.json"
    )
    record = run(config)
    assert set(record["seconds"]) == {"plain OpenCV", "a thread", "a worker"}
    assert all(len(s) == 3 and min(s) > 0 for s in record["seconds"].values())
    assert json.loads(config.out.read_text())["seconds"] == record["seconds"]


def test_the_table_holds_ratios_of_speeds_within_rounds() -> None:
    record = {
        "config": {
            "dataset": "imagenet2012",
            "data_dir": None,
            "image_size": 224,
            "batch_size": 10,
            "batches": 5,
            "rounds": 3,
        },
        "hardware": "a machine",
        "seconds": {"plain OpenCV": [1.0, 2.0, 4.0], "a worker": [2.0, 2.0, 16.0]},
    }
    lines = table([record]).splitlines()
    assert lines[0] == "| photographs | plain OpenCV | a worker |"
    assert lines[2] == (
        "| imagenet2012 (generated), 224 pixels | 1 (25 images/s) | 0.50 [0.25, 1.00] |"
    )
    assert "n = 3 rounds; a machine." in lines[-1]
