"""How far a sweep or a study is, and how long it will take: bars in a terminal, else lines."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from experiments.execution.tasks import Task


class Display:
    """Shows the runs of the whole, of which `execute` is given a part at a time.

    A context manager. The time left is an estimate: as many seconds for an epoch as the runs took
    that have ended so far, `jobs` at a time.

    Args:
      console: where to.
      work: of each of all the runs (`Task.work`).
      jobs: how many runs are made at a time.
    """

    def __init__(self, console: Console, work: Sequence[float], jobs: int) -> None:
        self.console = console
        self._total = len(work)
        self._ended = 0
        self._left = sum(work)  # work of the runs that have not ended
        self._jobs = jobs
        self._spent = 0.0  # seconds, of runs made here
        self._made = 0.0  # their work
        self._running: dict[str, tuple[float, float]] = {}  # since when, and its work
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,  # a plain log gets a line for each start and end
        )
        self._all = self._progress.add_task("runs", total=self._total, note="")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, task: Task) -> None:
        """A run begins."""
        self._running[task.name] = time.monotonic(), task.work
        if self.console.is_terminal:
            row = self._progress.add_task(f"  {task.name}", total=None, note="")
            self._rows[task.name] = row
        else:
            say(self.console, f"started {task.name}")

    def ended(self, task: Task, status: str, reason: str = "") -> None:
        """A run has ended, or was done before."""
        if (row := self._rows.pop(task.name, None)) is not None:
            self._progress.remove_task(row)
        self._ended += 1
        self._left -= task.work
        running = self._running.pop(task.name, None)
        if running is not None and status == "done":
            self._spent += time.monotonic() - running[0]
            self._made += task.work
        told = f" ({reason})" if reason else ""
        left = f", {note}" if running is not None and (note := self.left()) else ""
        say(self.console, f"[{self._ended}/{self._total}] {status} {task.name}{told}{left}")

    def look(self) -> None:
        """Renew the bar of all runs."""
        note = ", ".join(filter(None, [f"{self._ended}/{self._total}", self.left()]))
        self._progress.update(self._all, completed=self._ended, note=note)

    def left(self) -> str:
        """`about 5 min left`; empty as long as no run has ended, and at the end."""
        if not self._made or self._ended == self._total:
            return ""
        pace = self._spent / self._made
        now = time.monotonic()
        going = sum(min(now - since, pace * work) for since, work in self._running.values())
        seconds = (pace * self._left - going) / self._jobs
        return f"about {_duration(max(seconds, 1.0))} left"


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def say_table(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        say(console, "  ".join(cells).rstrip())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
