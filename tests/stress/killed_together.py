"""Whole experiments by two processes: they train as one, and when cut off go on as one.

python -m pytest tests/stress/killed_together.py        (a part of `make stress`)
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fast_compilation import FAST_COMPILATION
from tests.two_processes import SECONDS, command, numbers, pair, record_of

CUTS = 5
EVALUATIONS = 4


def test_two_processes_that_are_cut_off_end_as_two_that_are_not(
    rng: np.random.Generator,
    free_port: int,
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
    wait_for_all: Callable[..., None],
    tmp_path: Path,
) -> None:
    # 40 steps, an evaluation after each third one; a signal stops at step 20, between two of them.
    more = ("--epochs=2", "--eval_every=0.15")

    def start(name: str) -> list[subprocess.Popen[bytes]]:
        commands = pair(command(tmp_path, name, *more), free_port)
        return start_together(commands, devices=1, flags=FAST_COMPILATION)

    wait_for_all(start("whole"), SECONDS)
    checkpoints = tmp_path / "runs" / "cut" / "checkpoints"
    for number in range(CUTS):
        processes, deadline = start("cut"), time.monotonic() + SECONDS
        before = newest(checkpoints)
        while newest(checkpoints) == before:
            assert time.monotonic() < deadline, (tmp_path / "process0.log").read_text()
            assert all(process.poll() is None for process in processes), "ended by itself"
            time.sleep(0.002)
        if number == 0:  # while there are 20 steps to come
            processes[rng.integers(2)].send_signal(signal.SIGTERM)
            assert [process.wait(SECONDS) for process in processes] == [75, 75]
            assert (checkpoints / "20" / "interval").is_dir()
            continue
        time.sleep(rng.uniform(0, 0.2))  # a checkpoint takes about half as long
        for process in rng.permutation(np.array(processes, object)):
            os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait()
        if (checkpoints.parent / "record.json").exists():
            break
    else:
        wait_for_all(start("cut"), SECONDS)
    cut, whole = (record_of(tmp_path / "runs" / name) for name in ("cut", "whole"))
    assert cut["summary"]["resumed_at"] > 0
    assert numbers(cut) == numbers(whole), "the same number of processes: the same bits"
    for part in ("validation", "test"):
        assert cut["summary"][part] == whole["summary"][part]


def test_two_processes_train_as_one(
    free_port: int,
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
    wait_for_all: Callable[..., None],
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    commands = pair(command(tmp_path, "whole"), free_port)
    wait_for_all(start_together(commands, devices=1, flags=FAST_COMPILATION), SECONDS)
    record = record_of(runs / "whole")
    assert "2 cpu device(s) in 2 processes" in record["hardware"]
    # Where the processes ran is no part of the run.
    assert not {"coordinator", "processes", "process", "distributed"} & set(record["config"])
    # One of them wrote: every line once, one file of events, and progress from the first alone.
    assert [line["step"] for line in record["metrics"]] == [1, 2, 3, 4]
    assert len((runs / "whole" / "metrics.jsonl").read_text().splitlines()) == EVALUATIONS
    assert len(list((runs / "whole").glob("events.out.tfevents.*"))) == 1
    assert "step 4/4" in (tmp_path / "process0.log").read_text()
    assert "step " not in (tmp_path / "process1.log").read_text()

    # The same by one process with as many devices.
    alone = [command(tmp_path, "alone")]
    wait_for_all(start_together(alone, devices=2, flags=FAST_COMPILATION), SECONDS)
    for a, b in zip(numbers(record_of(runs / "alone")), numbers(record), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if name.endswith("accuracy"):  # one of 64 images may stand on an edge
                assert b[name] == pytest.approx(value, abs=1 / 60)
            elif name != "changed_codes":
                assert b[name] == pytest.approx(value, rel=1e-3)


def newest(checkpoints: Path) -> int:
    """The step of the newest checkpoint, -1 if there is none."""
    return max(
        (int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()), default=-1
    )
