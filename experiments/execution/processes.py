"""Child processes: pinned to cores, each on a GPU of its own, ended as a group."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.execution.combinations import PlanError
from experiments.execution.devices import environment_of, gpus
from experiments.execution.tasks import Task


@dataclass(frozen=True)
class _Place:
    """What one process has for itself."""

    cores: tuple[int, ...]
    environment: Mapping[str, str]


class LocalProcesses:
    """Runs tasks on this machine, so many at a time, each on cores and on a GPU of its own."""

    poll_seconds = 0.1

    def __init__(self, jobs: int, cores_per_job: int, stop_after: float) -> None:
        devices = gpus()
        self._free = [
            _Place(cores, environment_of(job, jobs, devices))
            for job, cores in enumerate(core_groups(jobs, cores_per_job))
        ]
        self._taken: dict[int, _Place] = {}
        self._stop_after = stop_after

    def has_room(self) -> bool:
        """Whether another task may start."""
        return bool(self._free)

    def start(self, task: Task) -> subprocess.Popen[bytes]:
        """Start a task; it holds its place until `code` says that it has ended."""
        place = self._free.pop(0)
        process = start_process(task.command, task.log, place.cores, place.environment)
        self._taken[process.pid] = place
        return process

    def code(self, job: subprocess.Popen[bytes]) -> int | None:
        """The exit code of a task, None while it runs; negative: the signal that killed it."""
        code = job.poll()
        if code is not None and job.pid in self._taken:
            self._free.append(self._taken.pop(job.pid))
        return code

    def end(self, jobs: Sequence[subprocess.Popen[bytes]]) -> None:
        """Ask tasks to end, and kill what does not."""
        end_processes(jobs, self._stop_after)


def core_groups(jobs: int, cores_per_job: int) -> list[tuple[int, ...]]:
    """One group of cores for each job, disjoint; empty groups where nothing is to be pinned.

    Raises PlanError if the cores do not suffice, or a number makes no sense.
    """
    if jobs < 1 or cores_per_job < 0:
        raise PlanError(
            f"--jobs must be at least 1 and --cores_per_job at least 0, not {jobs}, {cores_per_job}"
        )
    if cores_per_job == 0 or not hasattr(os, "sched_getaffinity"):
        return [()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    needed = jobs * cores_per_job
    if needed > len(cores):
        raise PlanError(
            f"--jobs={jobs} with --cores_per_job={cores_per_job} needs {needed} cores, "
            f"there are {len(cores)}: lower one of them, or pin nothing by --cores_per_job=0"
        )
    return [tuple(cores[i : i + cores_per_job]) for i in range(0, needed, cores_per_job)]


def start_process(
    command: Sequence[str],
    log_path: Path,
    cores: tuple[int, ...],
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own, on `cores`, appending to `log_path`.

    Args:
      environment: variables beside those of this process.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        with _pinned(cores):
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )


def end_processes(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """SIGTERM each process, wait up to `seconds` for all, SIGKILL what is left of their groups."""
    for process in processes:
        # Not its workers, without which a run could not go on to where it saves its state.
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal_group(process, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _pinned(cores: tuple[int, ...]) -> Iterator[None]:
    """Within it, this thread runs on `cores`; a child started there inherits them."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Within it, SIGINT, SIGTERM and SIGHUP are only noted, in the list it gives."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # A signal that is ignored (nohup, a shell's background job) stays ignored.
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, lambda n, _: received.append(n)) for number in heeded]
    try:
        yield received
    finally:
        for number, handler in zip(heeded, before, strict=True):
            signal.signal(number, handler)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
