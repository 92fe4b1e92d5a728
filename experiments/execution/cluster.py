"""Runs as jobs of Slurm, by submitit, which also does the same on this machine without Slurm.

What a job does, and how it goes on after its time is up: `experiments/execution/cluster_job.py`.
"""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ab_jax.training.existing_run import is_in_use
from ab_jax.training.stopping import EXIT_CODE
from experiments.execution.cluster_job import Training
from experiments.execution.combinations import PlanError
from experiments.execution.tasks import Task

_SECONDS_TO_SAVE = 120.0  # from the signal to the end of a job's time, a quarter of it at most
_SECONDS_BETWEEN_LOOKS = 15
_REQUEUES = 1000  # as often as it takes


class ClusterJobs:
    """Runs tasks as jobs, so many in the queue at a time.

    Args:
      executor: of submitit, as `make_executor` returns it.
      jobs: how many.
      stop_after: seconds that runs are given to save when the whole is stopped.
    """

    def __init__(self, executor: Any, jobs: int, stop_after: float) -> None:
        self._executor = executor
        self._left = jobs
        self._stop_after = stop_after
        self._queue = _Queue()
        self.poll_seconds = 0.2 if _is_local(executor) else 2.0

    def has_room(self) -> bool:
        """Whether another job may be submitted."""
        return self._left > 0

    def start(self, task: Task) -> tuple[Any, Task]:
        """Submit a task."""
        with _heeding_interrupts():
            job = self._executor.submit(Training(task.command, task.log.absolute()))
        self._left -= 1
        return job, task

    def code(self, job: tuple[Any, Task]) -> int | None:
        """The exit code of a task, None while its job waits or runs.

        A job that was ended from outside, by `scancel` say, has no result: its task was stopped.
        """
        submitted, task = job
        has_result = submitted.paths.result_pickle.exists()
        if not has_result and not self._is_gone(submitted):
            return None
        self._left += 1
        if not has_result:
            return EXIT_CODE
        try:
            return int(submitted.result())
        except Exception as error:  # what happened in the job, with its traceback
            with task.log.open("a") as log:
                log.write(f"{error}\n")
            return 1

    def _is_at_work(self, submitted: Any, task: Task) -> bool:
        # Slurm is told once, and need not be waited for.
        return is_in_use(task.directory) or (_is_local(self._executor) and not submitted.done())

    def _is_gone(self, submitted: Any) -> bool:
        if _is_local(self._executor):
            return bool(submitted.done())
        return not self._queue.holds(submitted.job_id)

    def end(self, jobs: Sequence[tuple[Any, Task]]) -> None:
        """Cancel jobs, and wait until their runs have saved."""
        for submitted, _ in jobs:
            submitted.cancel(check=False)
        deadline = time.monotonic() + self._stop_after
        while jobs and time.monotonic() < deadline:
            jobs = [one for one in jobs if self._is_at_work(*one)]
            time.sleep(self.poll_seconds)


@contextlib.contextmanager
def _heeding_interrupts() -> Iterator[None]:
    """What is started within it heeds SIGINT, by which submitit cancels a job on this machine.

    In the background of a shell it would be ignored, there and in all that is started from there.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Queue:
    """Slurm's queue, looked at now and then; submitit would ask `sacct`, which not all have."""

    def __init__(self) -> None:
        self._looked = -math.inf
        self._missing: dict[str, int] = {}  # how often in a row each job was not there
        self._held: set[str] | None = None

    def holds(self, job_id: str) -> bool:
        """Whether a job waits or runs; one is gone once it was missing twice."""
        if time.monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            self._held = self._look()
            if self._held is not None:
                for known in self._missing:
                    self._missing[known] += known not in self._held
        self._missing.setdefault(job_id, 0)
        if self._held is not None and job_id in self._held:
            self._missing[job_id] = 0
        return self._missing[job_id] < 2

    def _look(self) -> set[str] | None:
        command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
        found = subprocess.run(command, capture_output=True, text=True)
        return set(found.stdout.split()) if found.returncode == 0 else None


def _is_local(executor: Any) -> bool:
    return type(executor).__name__ == "LocalExecutor"


def make_executor(
    cluster: str, folder: Path, *, minutes: float, parameters: Mapping[str, Any]
) -> Any:
    """submitit's executor.

    Args:
      cluster: `slurm`, or `local`.
      folder: for its own files; of Slurm, one that all machines see.
      minutes: a job's time, at the end of which it is queued again.
      parameters: of `sbatch`, by submitit's names.

    Raises:
      PlanError: submitit or Slurm is not there, or a parameter is not known.
    """
    try:
        import submitit
    except ImportError:
        raise PlanError(
            'jobs are submitted by submitit, which is not installed: pip install ".[slurm]"'
        ) from None
    seconds = int(min(_SECONDS_TO_SAVE, 60 * minutes / 4))
    try:
        if cluster == "local":
            executor: Any = submitit.LocalExecutor(folder)
            executor.max_num_timeout = _REQUEUES
            executor.update_parameters(
                timeout_min=minutes,
                signal_delay_s=seconds,
                gpus_per_node=parameters.get("gpus_per_node", 0),
            )
        else:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=_REQUEUES)
            executor.update_parameters(
                time=max(1, round(minutes)), signal_delay_s=seconds, **parameters
            )
    except (RuntimeError, ValueError) as error:
        raise PlanError(" ".join(str(error).split())) from None
    return executor
