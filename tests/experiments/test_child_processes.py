"""Flags of several processes; whole experiments by two of them are in `make stress`."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.settings.config import Config, recorded
from tests.two_processes import SECONDS, command

Start = Callable[..., list[subprocess.Popen[bytes]]]


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
