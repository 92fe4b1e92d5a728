"""Jobs by submitit's executor for this machine, with a stand-in for training."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.execution import cluster_job as job
from experiments.study import main
from tests.experiments.fake_runs import House, alive, house, wait_for

__all__ = ["house"]
pytest.importorskip("submitit")

STUDY = """
about = "Does it work?"
[[stages]]
name = "start"
seeds = 0
run_name = "seed{seed}"
method = "float"
[[stages]]
name = "final"
seeds = 0
run_name = "seed{seed}"
init_from = "start/seed{seed}"
"""
ON = ("--on=submitit_local", "--results=")


@pytest.fixture
def file(house: House) -> str:
    (house.path / "small.toml").write_text(STUDY)
    # Jobs find this in the current directory.
    (house.path / "experiments/execution").mkdir()
    (house.path / "experiments/execution/__init__.py").touch()
    shutil.copy(Path(str(job.__file__)), house.path / "experiments/execution")
    return "small.toml"


def signal_the_job_when(condition: Callable[[], bool], run: Path) -> None:
    """Send a run's job what Slurm sends it before its time is up."""

    def send() -> None:
        wait_for(condition)
        stat = Path(f"/proc/{(run / 'pid').read_text()}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGUSR2)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.long
def test_a_job_whose_time_is_up_goes_on_in_the_next(house: House, file: str) -> None:
    run = house.path / "runs/small/start/seed0"
    count = run / "count"
    signal_the_job_when(lambda: count.exists() and int(count.read_text() or 0) > 2, run)
    code, output = house.call(main, file, *ON, fake="patient worker steps=30 sleep=0.05")
    assert code == 0, output
    assert "2 done" in output
    first = [line for line in (run / "log.txt").read_text().splitlines() if "first step" in line]
    assert first[0] == "first step 0"
    assert len(first) == 2
    assert int(first[1].split()[-1]) > 2
    jobs = house.path / "runs/small/jobs"
    assert "Requeued job" in "".join(path.read_text() for path in jobs.glob("*_log.out"))


def test_a_stopped_study_ends_its_jobs_and_goes_on(house: House, file: str) -> None:
    run = house.path / "runs/small/start/seed0"
    stop = ((run / "count").exists, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    code, output = house.call(main, file, *ON, fake="steps=600 sleep=0.1", stop=stop)
    assert code == 128 + signal.SIGTERM
    assert "stopped small/start/seed0" in output
    wait_for(lambda: not alive(run / "pid"), seconds=10)
    code, output = house.call(main, file, *ON)
    assert code == 0, output
    assert "2 done" in output


def test_a_job_that_fails_is_told(house: House, file: str) -> None:
    code, output = house.call(main, file, *ON, fake="fail=0")
    assert code == 1
    assert "failed small/start/seed0 (exit code 1)" in output
    assert "RuntimeError: the loss is not finite" in output
    assert "wait for small/start/seed0" in output


def test_slurm_has_to_be_there(house: House, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(house.path))
    code, output = house.call(main, file, "--on=slurm")
    assert code == 2
    assert 'Could not detect "srun"' in output


def test_submitit_has_to_be_there(house: House, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, output = house.call(main, file, "--on=slurm")
    assert code == 2
    assert 'not installed: pip install ".[slurm]"' in output


def test_a_parameter_that_sbatch_does_not_have_is_refused(
    house: House, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (house.path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", f"{house.path}:{os.environ['PATH']}")
    code, output = house.call(main, file, "--on=slurm", "--slurm", "acount=mine")
    assert code == 2
    assert "Unavailable parameter(s): ['acount']" in output
