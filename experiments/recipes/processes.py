"""An experiment in several processes: how they find each other, and which of them writes."""

import dataclasses
from pathlib import Path
from typing import Any

from ab_jax.data.dataset import Dataset
from ab_jax.data.facts import facts
from ab_jax.data.stream import StreamedDataset
from ab_jax.training.distributed import check_same_flags, first_succeeds, is_first, start
from ab_jax.training.records import RunDirectory
from experiments.recipes.free_flags import FREE_FLAGS

# Flags that say where the processes run. They are no part of what a run is: it may go on elsewhere.
_WHERE = ("coordinator", "processes", "process", "distributed")


def join(config: Any) -> None:
    """Find the other processes, as the flags say; before anything is asked of JAX.

    Raises:
      ValueError, ConnectionError: as `ab_jax.training.distributed.start`.
    """
    start(config.coordinator, config.processes, config.process, from_cluster=config.distributed)


def recorded(config: Any) -> dict[str, Any]:
    """The flags that make a run what it is, for its record."""
    flags = dataclasses.asdict(config)
    return {name: value for name, value in flags.items() if name not in _WHERE}


def open_run(
    path: Path, experiment: str, config: Any, dataset: Dataset | StreamedDataset
) -> RunDirectory:
    """The run's directory, into which the first process writes.

    Raises:
      ValueError: processes of different flags; otherwise as `RunDirectory`.
    """
    flags = recorded(config)
    check_same_flags(flags)
    with first_succeeds(f"Opening {path}"):
        return RunDirectory(
            path,
            experiment=experiment,
            config=flags,
            data=facts(dataset),
            free=FREE_FLAGS,
            allow_changed=config.allow_changed,
            writes=is_first(),
        )
