"""A whole experiment by two processes, from the command line: one record, the same numbers."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.binarynet_cifar10 import Config
from experiments.recipes.processes import recorded
from tests.fast_compilation import FAST_COMPILATION
from tests.two_processes import SECONDS, command, numbers, pair, record_of

Start = Callable[..., list[subprocess.Popen[bytes]]]
EVALUATIONS = 4


def test_two_processes_train_as_one(
    free_port: int,
    start_together: Start,
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
    start_together: Start,
    tmp_path: Path,
    flags: list[str],
    message: str,
) -> None:
    words = [word for word in command(tmp_path, "refused") if not word.startswith("--norm_group")]
    (process,) = start_together([[*words, *flags]], devices=4)
    assert process.wait(SECONDS) == 1
    *_, error = (tmp_path / "process0.log").read_text().splitlines()
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "runs" / "refused" / "metrics.jsonl").exists()
