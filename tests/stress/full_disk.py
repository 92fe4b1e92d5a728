"""A real process on a full disk; a part of `make stress`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_full_disk_ends_a_run_with_one_line_and_costs_an_interval(tmp_path: Path) -> None:
    """On a disk of its own, with room for two checkpoints and a half."""
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here (that takes root)")

    def train(name: str) -> subprocess.CompletedProcess[str]:
        flags = ("--dataset=digits", "--width=0.03125", "--batch_size=64", "--warmup=0")
        flags += ("--validation=1269", "--epochs=3", "--eval_every=0.5", "--no_read_test")
        command = [sys.executable, "-m", "experiments.binarynet_cifar10", *flags]
        return subprocess.run(
            [*command, f"--runs_dir={disk}", f"--name={name}", f"--compilation_cache={cache}"],
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
            capture_output=True,
            text=True,
        )

    try:
        before = shutil.disk_usage(disk).free
        assert train("whole").returncode == 0
        kept = len(list((disk / "whole" / "checkpoints").iterdir()))
        size = (before - shutil.disk_usage(disk).free) / kept
        (disk / "filler").write_bytes(bytes(int(shutil.disk_usage(disk).free - 2.5 * size)))
        full = train("run")
        assert full.returncode == 1
        (error,) = full.stderr.splitlines()
        assert re.match(r"error: .* (could not|cannot) be written.*No space left on device", error)
        assert len(error) < 500
        (disk / "filler").unlink()
        resumed = train("run")
        assert resumed.returncode == 0, resumed.stderr
        whole, run = (
            [json.loads(line) for line in (disk / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "run")
        )
        for line in (*whole, *run):
            line.pop("images_per_second")
        assert run == whole
        summary = json.loads((disk / "run" / "record.json").read_text())["summary"]
        assert summary["resumed_at"] > 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
