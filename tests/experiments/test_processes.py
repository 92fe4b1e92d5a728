"""A whole experiment by two processes, from the command line: one record, the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.binarynet_cifar10 import Config
from experiments.recipes.processes import recorded

Start = Callable[..., list[subprocess.Popen[bytes]]]
SECONDS = 240  # given to each pair; alone on two cores they take a tenth
# Compiling takes most of the time of these runs; how fast the program is does not matter.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
EVALUATIONS = 4


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """BinaryNet on digits, four of an epoch's twenty steps with an evaluation after each."""
    flags = {
        "dataset": "digits",
        "validation": 64,
        "width": 1 / 32,
        "epochs": 0.2,
        "batch_size": 64,
        "warmup": 0.0,
        "eval_every": 0.05,
        "norm_group": 1,
        "runs_dir": tmp_path / "runs",
        "compilation_cache": tmp_path / "cache",
    }
    words = [sys.executable, "-m", "experiments.binarynet_cifar10", "--no_flip"]
    words += [f"--{name}={value}" for name, value in flags.items()]

    def command(name: str, *more: str) -> list[str]:
        return [*words, f"--name={name}", *more]

    return command


def pair(command: list[str], port: int) -> list[list[str]]:
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [[*command, *flags, f"--process={i}"] for i in range(2)]


def record_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "record.json").read_text())


def numbers(record: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics but for the speed."""
    return [
        {name: value for name, value in line.items() if name != "images_per_second"}
        for line in record["metrics"]
    ]


def test_two_processes_train_as_one_and_go_on_when_cut_off(
    command: Callable[..., list[str]],
    free_port: int,
    start_together: Start,
    wait_for_all: Callable[..., None],
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    whole = start_together(pair(command("whole"), free_port), devices=1, flags=FAST_COMPILATION)
    wait_for_all(whole, SECONDS)
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
    alone = start_together([command("alone")], devices=2, flags=FAST_COMPILATION)
    # Meanwhile: both processes are killed once there is something to go on from.
    cut = start_together(pair(command("cut"), free_port), devices=1, flags=FAST_COMPILATION)
    deadline = time.monotonic() + SECONDS
    while not any(path.name.isdecimal() for path in (runs / "cut" / "checkpoints").glob("*")):
        assert time.monotonic() < deadline, (tmp_path / "process0.log").read_text()
        assert all(process.poll() is None for process in cut), "ended before it was cut off"
        time.sleep(0.02)
    for process in cut:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (runs / "cut" / "record.json").exists()
    wait_for_all(alone, SECONDS)
    resumed = start_together(pair(command("cut"), free_port), devices=1, flags=FAST_COMPILATION)
    wait_for_all(resumed, SECONDS)

    for a, b in zip(numbers(record_of(runs / "alone")), numbers(record), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if name.endswith("accuracy"):  # one of 64 images may stand on an edge
                assert b[name] == pytest.approx(value, abs=1 / 60)
            elif name != "changed_codes":
                assert b[name] == pytest.approx(value, rel=1e-3)
    after = record_of(runs / "cut")
    assert after["summary"]["resumed_at"] > 0
    assert numbers(after) == numbers(record), "the same number of processes: the same bits"
    for part in ("validation", "test"):
        assert after["summary"][part] == record["summary"][part]


def test_a_signal_to_one_process_stops_both_at_the_same_step(
    command: Callable[..., list[str]],
    free_port: int,
    start_together: Start,
    wait_for_all: Callable[..., None],
    tmp_path: Path,
) -> None:
    words = command("stopped", "--epochs=15", "--eval_every=6.5")  # 300 steps, one reading at 130
    run, log = tmp_path / "runs" / "stopped", tmp_path / "process0.log"
    processes = start_together(pair(words, free_port), devices=1, flags=FAST_COMPILATION)
    deadline = time.monotonic() + SECONDS
    while "step 20/300" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(SECONDS) for process in processes] == [75, 75], log.read_text()
    logs = [(tmp_path / f"process{i}.log").read_text() for i in range(2)]
    at = [re.findall(r"stopped at step (\d+), asked by SIGTERM", text) for text in logs]
    assert at[0] == at[1]
    (step,) = map(int, at[0])
    assert 20 < step < 300
    assert (run / "checkpoints" / str(step) / "MANIFEST").exists()

    resumed = start_together(pair(words, free_port), devices=1, flags=FAST_COMPILATION)
    wait_for_all(resumed, SECONDS)
    record = record_of(run)
    assert record["summary"]["resumed_at"] == step
    assert [line["step"] for line in record["metrics"]] == [130, 260, 300]


def test_the_record_holds_the_flags_of_the_run_alone() -> None:
    first, second = (
        recorded(Config(coordinator="10.0.0.1:9876", processes=2, process=i, seed=7))
        for i in range(2)
    )
    assert first == second
    assert first["seed"] == 7
    assert first == recorded(Config(seed=7))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2"], "--processes=2 needs --coordinator and --process too"),
        (["--distributed"], "--distributed found no cluster"),
        (["--norm_group=3"], "norm_group=3 does not divide the 4 devices"),
    ],
)
def test_the_command_line_ends_with_one_line(
    command: Callable[..., list[str]],
    start_together: Start,
    tmp_path: Path,
    flags: list[str],
    message: str,
) -> None:
    words = [word for word in command("refused") if not word.startswith("--norm_group")]
    (process,) = start_together([[*words, *flags]], devices=4)
    assert process.wait(SECONDS) == 1
    *_, error = (tmp_path / "process0.log").read_text().splitlines()
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "runs" / "refused" / "metrics.jsonl").exists()
