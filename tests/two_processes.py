"""BinaryNet on digits by two processes: the commands, and what their records hold."""

import json
import sys
from pathlib import Path
from typing import Any

SECONDS = 240  # given to each pair; alone on two cores they take a tenth


def command(tmp_path: Path, name: str, *more: str) -> list[str]:
    """Four of an epoch's twenty steps with an evaluation after each, if not otherwise by `more`."""
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
        "compilation_cache": tmp_path.parent / "cache",  # of the tests of one process
        "name": name,
    }
    words = [sys.executable, "-m", "experiments.binarynet_cifar10", "--no_flip"]
    return [*words, *(f"--{flag}={value}" for flag, value in flags.items()), *more]


def pair(command: list[str], port: int) -> list[list[str]]:
    """The command for each of two processes."""
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [[*command, *flags, f"--process={i}"] for i in range(2)]


def record_of(directory: Path) -> dict[str, Any]:
    """The record of a run."""
    return json.loads((directory / "record.json").read_text())


def numbers(record: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics but for the speed."""
    return [
        {name: value for name, value in line.items() if name != "images_per_second"}
        for line in record["metrics"]
    ]
