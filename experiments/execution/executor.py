"""Many runs, several at a time: the same for a sweep, a study, this machine and a cluster.

Where the processes run is an `Engine`'s business; what is done is skipped, what was cut off is
started again and resumes by itself.
"""

import dataclasses
import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from ab_jax.files import write_whole, writing
from ab_jax.training.stopping import EXIT_CODE
from experiments.execution.lots import in_lots, task_of
from experiments.execution.progress import Display, say, say_table
from experiments.execution.tasks import Task


class Engine(Protocol):
    """Where tasks run. A job is whatever `start` returns."""

    poll_seconds: float

    def has_room(self) -> bool:
        """Whether another task may start."""

    def start(self, task: Task) -> Any:
        """Start a task."""

    def code(self, job: Any) -> int | None:
        """The exit code of a task, None while it runs; negative: the signal that killed it."""

    def end(self, jobs: Sequence[Any]) -> None:
        """Ask tasks to end, and wait for them."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `status` is done, skipped, failed, stopped or not started."""

    task: Task
    status: str
    reason: str = ""
    log: Path | None = None  # what its process said; None: the task's own


def execute(
    tasks: Sequence[Task],
    engine: Engine,
    display: Display,
    stop_signals: Sequence[int],
    keep: Callable[[Task], None] = lambda task: None,
    *,
    together: int = 1,
    jobs: int = 1,
    form: str = "auto",
) -> list[Outcome]:
    """Make all runs; ends those that run and returns early once `stop_signals` is not empty.

    Args:
      tasks: to be started in this order.
      engine: where they run.
      display: what is told of each start and end.
      stop_signals: signals received so far; somebody else appends.
      keep: called with each run that is complete.
      together: how many of them one process makes at most, where they are alike.
      jobs: how many processes there are at a time.
      form: how that computes their steps.
    """
    outcomes: list[Outcome] = []

    def end(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.status in ("done", "skipped"):
            keep(outcome.task)
        display.ended(outcome.task, outcome.status, outcome.reason)

    to_do = [task for task in tasks if task.state != "done"]
    for task in tasks:
        if task not in to_do:
            end(Outcome(task, "skipped", "done before"))
    pending = in_lots(to_do, together, jobs)
    running: list[tuple[list[Task], Any, float]] = []
    try:
        while (pending or running) and not stop_signals:
            while pending and engine.has_room():
                lot = pending.pop(0)
                running.append((lot, engine.start(task_of(lot, form)), time.monotonic()))
                for task in lot:
                    display.started(task)
            time.sleep(engine.poll_seconds)
            for one in list(running):
                lot, job, started = one
                if (code := engine.code(job)) is not None:
                    running.remove(one)
                    for task in lot:
                        judged = _judge(task, code, time.monotonic() - started)
                        end(dataclasses.replace(judged, log=_log_of(task, lot)))
            display.look()
    finally:
        engine.end([job for _, job, _ in running])
        for task in itertools.chain.from_iterable(lot for lot, _, _ in running):
            end(Outcome(task, "done" if task.state == "done" else "stopped"))
    left = itertools.chain.from_iterable(pending)
    return outcomes + [Outcome(task, "not started") for task in left]


def _log_of(task: Task, lot: Sequence[Task]) -> Path:
    """Where a run says how it ended; of a lot that ended as a whole, where its process did."""
    return task.log if task.log.exists() else lot[0].log


def _judge(task: Task, code: int, seconds: float) -> Outcome:
    if task.state == "done":
        # Whatever its process said: another one may have completed the run before it.
        if lines := task.differences():
            return Outcome(task, "failed", f"record.json disagrees: {'; '.join(lines)}")
        return Outcome(task, "done", f"{seconds:.0f} s")
    if code == EXIT_CODE:
        return Outcome(task, "stopped", "the same command resumes it")
    if code == 0:
        return Outcome(task, "failed", "ended without record.json")
    reason = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return Outcome(task, "failed", reason)


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print how many runs ended how, and for each failed one its reason, its log and its end."""
    counts = Counter(outcome.status for outcome in outcomes)
    say(console, ", ".join(f"{n} {status}" for status, n in counts.items()))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    rows = [(o.task.name, o.reason, str(o.log or o.task.log)) for o in failed]
    if rows:
        say_table(console, [("failed", "reason", "log"), *rows])
    for line in dict.fromkeys(_last_line(outcome.log or outcome.task.log) for outcome in failed):
        say(console, f"  {line}")


def exit_code(outcomes: Sequence[Outcome], stop_signals: Sequence[int]) -> int:
    """0 all done, 1 some failed, 75 some stopped, 128 and the signal that ended the whole."""
    if stop_signals:
        return 128 + stop_signals[0]
    statuses = {outcome.status for outcome in outcomes}
    if "failed" in statuses:
        return 1
    return EXIT_CODE if statuses & {"stopped", "not started"} else 0


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file so that `target` is at any time absent, the old file, or the whole new one."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, source.read_bytes())


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), f"{log} is empty")
