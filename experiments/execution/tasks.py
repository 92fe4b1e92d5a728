"""What a sweep or a study has to do: a task a run, and what is there of it already.

Whether a directory holds the run that is asked for, and whether a process is at work there, is
found out as the run itself does it (`ab_jax.training.existing_run`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ab_jax.training.existing_run import differences, is_in_use, stored_run
from experiments.execution.combinations import PlanError
from experiments.settings.config import FREE_FLAGS, PLACES
from experiments.settings.old_flags import ADDED_LATER, todays


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run that is to be made, by a process of its own.

    Attributes:
      name: a path below the directory of runs.
      directory: where the run lives.
      command: what makes it.
      flags: as its record will hold them.
    """

    name: str
    directory: Path
    command: tuple[str, ...]
    flags: Mapping[str, Any]

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.directory / "log.txt"

    @property
    def record(self) -> Path:
        """There once the run is complete."""
        return self.directory / "record.json"

    @property
    def work(self) -> float:
        """How long it trains, in epochs (or steps, or in runs): to estimate the time left."""
        return float(self.flags.get("epochs") or self.flags.get("steps") or 1.0)

    @property
    def state(self) -> str:
        """`done`, `cut off` (a directory without record.json) or `new`."""
        if self.record.exists():
            return "done"
        return "cut off" if self.directory.exists() else "new"

    def differences(self) -> list[str]:
        """The flags in which what is stored of this run differs from what is asked.

        Raises:
          PlanError: what is stored is damaged.
        """
        try:
            stored = stored_run(self.directory)
        except ValueError as error:
            raise PlanError(str(error)) from None
        if stored is None or (self.flags.get("allow_changed") and not self.record.exists()):
            return []
        was = todays(stored.get("experiment"), stored.get("config", {}))
        return differences(was, self.flags, FREE_FLAGS | PLACES, ADDED_LATER)


def check(tasks: Iterable[Task]) -> None:
    """See that no run's directory is in the way.

    Raises:
      PlanError: names every culprit.
    """
    problems = []
    for task in tasks:
        if lines := task.differences():
            problems.append(
                f"{task.directory} exists with other flags:\n"
                + "".join(f"    {line}\n" for line in lines)
                + f"  give another name, or remove {task.directory}"
            )
        elif is_in_use(task.directory):
            problems.append(f"{task.directory} is in use: wait, or end its process")
    if problems:
        raise PlanError("\n".join(problems))
