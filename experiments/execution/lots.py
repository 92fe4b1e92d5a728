"""Which runs train together in one process, and whether they should.

An accelerator is idle under one narrow network; a CPU is not, and gets a process a run.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments.execution.devices import has_accelerator
from experiments.execution.tasks import Task
from experiments.settings.config import PLACES, Config
from experiments.study_design.expansion import arguments

#: How many runs train together: so many, or as the machine suggests.
Together = int | Literal["auto"]

#: How their steps are computed together (`ab_jax.training.members`): auto measures.
Form = Literal["auto", "vmap", "unrolled", "in_turn"]

#: Flags in which runs may differ that train together: they are arrays or numbers to the compiled
#: step, or none of its business. (A teacher may be another one, but all have one or none has.)
OF_MEMBERS = frozenset(
    {
        *("name", "seed", "init_from", "teacher", "runs_dir", "allow_changed"),
        *("learning_rate", "final_rate", "warmup", "momentum", "weight_decay"),
        *("ramp", "ramp_start", "ramp_stop", "act_start", "act_stop"),
        *("keep_checkpoints", "read_test", "watch"),
    }
)

_MOST = 8  # on accelerators, unless told otherwise: each has a state of its own in memory


def members_of_a_lot(together: Together) -> int:
    """How many runs train together at most.

    Raises:
      ValueError: less than one.
    """
    if together == "auto":
        return _MOST if has_accelerator() else 1
    if together < 1:
        raise ValueError(f"--together={together} should be at least 1, or auto")
    return together


def in_lots(tasks: Sequence[Task], most: int, jobs: int = 1) -> list[list[Task]]:
    """The tasks in lots, in the order of the first of each.

    Args:
      tasks: whose lots are to be made.
      most: in a lot.
      jobs: lots that are made at a time: alike tasks are enough for each of them, and lots of one
        size share a compiled program.
    """
    alike: dict[Any, list[Task]] = {}
    for task in tasks:
        alike.setdefault(_kind(task.flags) or task.name, []).append(task)
    lots = []
    for group in alike.values():
        count = max(-(-len(group) // most), min(jobs, len(group)))
        cuts = [len(group) * i // count for i in range(count + 1)]
        lots += [group[a:b] for a, b in itertools.pairwise(cuts)]
    places = {task.name: place for place, task in enumerate(tasks)}
    return sorted(lots, key=lambda lot: places[lot[0].name])


def task_of(lot: Sequence[Task], form: str = "auto") -> Task:
    """What makes all runs of a lot, logged where the first of them lives.

    Args:
      lot: at least one.
      form: how their steps are computed together, one of `Form`.
    """
    if len(lot) == 1:
        return lot[0]
    words = [sys.executable, "-m", "experiments.together", f"--form={form}"]
    words.append(f"--experiment={_experiment(lot[0])}")
    for task in lot:
        flags = {name: value for name, value in task.flags.items() if name not in PLACES}
        words += ["--", *arguments(Config(**flags))]
    return dataclasses.replace(lot[0], command=tuple(words))


def _kind(flags: Mapping[str, Any]) -> Any:
    """Equal for runs that can train together; None: this one trains alone."""
    if "network" not in flags or flags.get("float_epochs") or flags.get("profile"):
        return None
    same = {k: v for k, v in flags.items() if k not in OF_MEMBERS}
    same["has_teacher"] = flags.get("teacher") is not None
    return tuple(sorted((k, repr(v)) for k, v in same.items()))


def _experiment(task: Task) -> str:
    """The module in experiments/ that makes a run."""
    return task.command[task.command.index("-m") + 1].removeprefix("experiments.")
