"""A study by submitit's executor for this machine, its jobs cut off and the study itself stopped.

python -m pytest tests/long/study_jobs.py        (some minutes; not a part of `make test`)
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fast_compilation import FAST_COMPILATION

pytest.importorskip("submitit")
ROOT = Path(__file__).parents[2]
SECONDS = 900.0

STUDY = """
about = "Cut off, and whole."
[flags]
network = "binarynet"
width = 0.0625
dataset = "digits"
batch_size = 64
flip = false
warmup = 0.0
[[stages]]
name = "start"
seeds = 0
run_name = "float"
method = "float"
epochs = 4.0
read_test = false
[[stages]]
name = "final"
seeds = 0
run_name = "{method}"
init_from = "start/float"
method = ["ste", "ab"]
epochs = 10.0
"""


def test_a_study_that_is_cut_off_ends_as_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text(STUDY)

    def start(name: str, *words: str) -> subprocess.Popen[str]:
        places = [f"--runs_dir={tmp_path / name}", "--results="]
        places.append(f"--compilation_cache={tmp_path / 'cache'}")
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.study", tmp_path / "jobs.toml", *places, *words],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole = start("whole", "--jobs=2", "--cores_per_job=0")
    output, _ = whole.communicate(timeout=SECONDS)
    assert whole.returncode == 0, output

    # Of the final runs one is cut off by the study's end, the other by a signal to its job.
    runs = tmp_path / "cut/jobs/final"
    cut = start("cut", "--on=submitit_local")
    wait_for(lambda: len(lines(runs / "ste/metrics.jsonl")) > 2, cut)
    cut.send_signal(signal.SIGTERM)
    output, _ = cut.communicate(timeout=SECONDS)
    assert cut.returncode == 128 + signal.SIGTERM, output
    assert "stopped jobs/final/ste" in output
    assert not (runs / "ste/record.json").exists()

    cut = start("cut", "--on=submitit_local")
    wait_for(lambda: len(lines(runs / "ab/metrics.jsonl")) > 2, cut)
    job = job_of(runs / "ab")
    os.kill(job, signal.SIGUSR2)  # as Slurm does before a job's time is up
    output, _ = cut.communicate(timeout=SECONDS)
    assert cut.returncode == 0, output
    assert "1 skipped, 2 done" in output
    told = "".join(path.read_text() for path in (tmp_path / "cut/jobs/jobs").glob("*_log.out"))
    assert "Requeued job" in told

    for name in ("start/float", "final/ste", "final/ab"):
        one, other = (numbers(tmp_path / place / "jobs" / name) for place in ("whole", "cut"))
        assert one == other, name
    for name in ("ste", "ab"):
        assert "stopped at step" in (runs / name / "log.txt").read_text()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def job_of(run: Path) -> int:
    """The process that waits for a run's own one, which says who it is in its lock."""
    process = int((run / "lock").read_text().split()[1])
    status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(status[1])


def numbers(run: Path) -> dict[str, Any]:
    """What a run has computed, without the times that it took."""
    record = json.loads((run / "record.json").read_text())
    timed = {"seconds", "evaluation_seconds", "images_per_second", "resumed_at"}
    metrics = [{k: v for k, v in line.items() if k not in timed} for line in record["metrics"]]
    summary = {k: v for k, v in record["summary"].items() if k not in timed}
    return {"metrics": metrics, "summary": summary}
