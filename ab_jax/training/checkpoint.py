"""Checkpoints of a training run, by Orbax: the last few states and the best, each with a manifest.

    checkpoints/STEP/network     parameters and model state, what another run can start from
    checkpoints/STEP/rest        step, optimizer state and random key
    checkpoints/STEP/scales      scales of the weights, in runs that train them
    checkpoints/STEP/interval    where a run stopped between two evaluations: see `Interval`
    checkpoints/STEP/run.json    the seal of the metrics up to there and the ramps: see `Standing`
    checkpoints/STEP/about.json  its step, and the validation accuracy, by which the best is known
    checkpoints/STEP/MANIFEST    SHA-256 of each of these files, written last

The step is the position in the data and in every schedule, and random numbers are keyed by it.
"""

import concurrent.futures
import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from ab_jax.linen import RANGES
from ab_jax.training.checkpoint_items import (
    FIELDS,
    Interval,
    Standing,
    check_same_shapes,
    host_arrays,
    items_of,
    shapes,
    where_to,
    with_ranges_of,
    with_todays_ranges,
    without_ranges,
)
from ab_jax.training.distributed import is_first, to_global, to_own, value_of_first
from ab_jax.training.retention import (
    NoWholeCheckpointError,
    newest_whole,
    remove_replaced,
    seal,
    written,
)
from ab_jax.training.state import TrainState

# Orbax numbers saves for the whole process: of two that threads start at once it would take the
# directory of one as made when that of the other is.
_STARTS_OF_SAVES = threading.Lock()


class Checkpoints:
    """The checkpoints in a directory, named by their step.

    A context manager: leaving it waits for the write under way. Reading changes nothing there.
    Of several processes all call its methods, at the same steps: they write a checkpoint together,
    the first one seals it, and all restore the same. The states are each one's own.

    Args:
      directory: created when something is saved.
      keep: how many of the newest to keep, beside the best.

    Raises:
      ValueError: `keep` is less than 1.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep} must be at least 1.")
        self._directory = directory.absolute()
        self._keep = keep
        self._newest: int | None = None  # of those known to be whole
        self._looked = False
        items = {name: ocp.StandardCheckpointHandler() for name in (*FIELDS, "interval")}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**items))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._sealing: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._finish()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none at all.

        Warns:
          DamagedCheckpointWarning: a newer one is damaged; names the file.

        Raises:
          NoWholeCheckpointError: all are damaged; names the files.
        """
        self._finish()
        if not self._looked:
            self._newest = self._find_newest()
            self._looked = True
        return self._newest

    @property
    def latest_path(self) -> Path | None:
        """The directory of that checkpoint."""
        step = self.latest_step
        return None if step is None else self._path(step)

    def check(self) -> None:
        """Raise what went wrong with the write in the background, if it is known already.

        Raises:
          OSError: a checkpoint could not be written; names it and the last whole one.
        """
        if self._sealing is not None and self._sealing.done():
            self._finish()

    @property
    def standing(self) -> Standing:
        """Where the run stood at that checkpoint; of none, and of older ones, nothing is known."""
        return Standing() if self.latest_path is None else Standing.read(self.latest_path)

    def save(
        self,
        state: TrainState,
        *,
        accuracy: float | None = None,
        interval: Interval | None = None,
        standing: Standing | None = None,
    ) -> None:
        """Write the state in the background; a whole one of that step is left as it is.

        Args:
          state: its arrays may be overwritten as soon as this returns.
          accuracy: on the validation part, 0 to 1; the best checkpoint is kept.
          interval: between two evaluations, what there is since the last one.
          standing: where the run stands.

        Raises:
          OSError: this one, or the one before, could not be written.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        items = {
            item: ocp.args.StandardSave(to_global(tree)) for item, tree in items_of(state).items()
        }
        if interval is not None:
            items["interval"] = ocp.args.StandardSave(interval.to_tree())
        try:
            # Over what a killed process may have left of it.
            path = written(self._path(step))
            with _STARTS_OF_SAVES:
                self._orbax.save(path, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._not_written(step, error) from error
        self._sealing = self._thread.submit(self._seal, step, accuracy, standing)

    def restore(self, like: TrainState) -> TrainState:
        """The newest whole state.

        Args:
          like: a state of the same structure, shapes and dtypes.

        Raises:
          FileNotFoundError: there is no checkpoint. ValueError: none is whole, or it has another
            step's name, or the states differ in structure or shapes; names the first such leaf.
        """
        path = self._existing()
        wanted, stored = items_of(like), self._stored(path)
        # Whether there are scales decides on the rest.
        for item in ("scales", "fits", "network", "rest"):
            there, here = stored.get(item, {}), wanted.get(item, {})
            there = with_todays_ranges(there, here) if item == "network" else there
            check_same_shapes(self._directory, there, here)
        targets = {item: where_to(tree) for item, tree in wanted.items()}
        targets["network"] = with_ranges_of(stored["network"], targets["network"])
        found = self._restore(path, **targets)
        restored = {item: to_own(found[item]) for item in targets}
        if int(step := restored["rest"]["step"]) != int(path.name):  # of older ones
            raise ValueError(f"{path} is the checkpoint of step {step}. Give it that name.")
        restored["network"] = with_todays_ranges(restored["network"], wanted["network"])
        return TrainState(**{k: v for item in wanted for k, v in restored[item].items()})

    def restore_interval(self) -> Interval | None:
        """What the newest whole checkpoint holds beside its state; None: it is of an evaluation.

        Raises:
          FileNotFoundError: there is no checkpoint. ValueError: none is whole.
        """
        path = self._existing()
        stored = self._stored(path).get("interval")
        if stored is None:
            return None
        return Interval.from_tree(self._restore(path, interval=host_arrays(stored))["interval"])

    def restore_network(self, like: TrainState) -> TrainState:
        """`like` with the newest whole checkpoint's parameters and model state.

        Ranges of activations that only one of the two networks has stay as they are in `like`: a
        network may start from one whose activations were not quantized, or otherwise.

        Raises:
          FileNotFoundError: there is no checkpoint. ValueError: none is whole, or a network of
            another structure or of other shapes.
        """
        path = self._existing()
        stored = self._stored(path)["network"]
        wanted = items_of(like)["network"]
        check_same_shapes(self._directory, without_ranges(stored), without_ranges(wanted))
        network = with_ranges_of(stored, where_to(wanted))
        restored = to_own(self._restore(path, network=network)["network"])
        restored = with_todays_ranges(restored, wanted)
        ranges = wanted["model_state"].get(RANGES)
        if shapes(restored["model_state"].get(RANGES)) != shapes(ranges):
            restored = without_ranges(restored)
            if ranges is not None:
                restored["model_state"][RANGES] = ranges
        return dataclasses.replace(like, **restored)

    def network(self) -> dict[str, Any]:
        """`params` and `model_state` of the newest whole checkpoint as they are, in NumPy arrays;
        and `scales`, of a run that trained them.

        Raises:
          FileNotFoundError: there is no checkpoint. ValueError: none is whole.
        """
        path = self._existing()
        stored = self._stored(path)
        items = [item for item in ("network", "scales") if item in stored]
        restored = self._restore(path, **{item: host_arrays(stored[item]) for item in items})
        return {name: tree for item in items for name, tree in restored[item].items()}

    def _find_newest(self) -> int | None:
        """The first process looks, and tells the others."""
        none, damaged = -1, -2
        if not is_first():
            found = value_of_first(none)
            if found == damaged:
                raise NoWholeCheckpointError(
                    f"No checkpoint in {self._directory} is whole; process 0 says of each why."
                )
            return None if found == none else found
        try:
            newest = newest_whole(self._directory)
        except NoWholeCheckpointError:
            value_of_first(damaged)
            raise
        value_of_first(none if newest is None else newest)
        return newest

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _existing(self) -> Path:
        path = self.latest_path
        if path is None:
            raise FileNotFoundError(f"There is no checkpoint in {self._directory}.")
        return path

    def _seal(self, step: int, accuracy: float | None, standing: Standing | None) -> None:
        """Wait for Orbax, then make the checkpoint a trusted one; in a thread of its own."""
        try:
            self._orbax.wait_until_finished()
            if is_first():
                if standing is not None:
                    standing.write(written(self._path(step)))
                seal(self._path(step), accuracy)
        except Exception as error:
            raise self._not_written(step, error) from error
        self._newest = step
        if is_first():
            remove_replaced(self._directory, step, self._keep)

    def _finish(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def _not_written(self, step: int, error: Exception) -> OSError:
        last = "no whole one" if self._newest is None else f"that of step {self._newest}"
        reason = str(error).partition(" [tensorstore_spec")[0]
        if "No space left" in reason:  # of which tensorstore tells at length
            reason = "No space left on device"
        free = shutil.disk_usage(self._directory.parent).free
        return OSError(
            f"The checkpoint of step {step} could not be written in {self._directory} "
            f"({free / 1e6:.1f} MB are free there): {reason}. There is {last} to go back to. Free "
            f"space or mend the disk, then give the same command again."
        )

    def _stored(self, path: Path) -> dict[str, Any]:
        """The trees of shapes and dtypes of the items that there are."""
        metadata = self._orbax.metadata(path).item_metadata
        return {item: metadata[item].tree for item in metadata if (path / item).is_dir()}

    def _restore(self, path: Path, **wanted: Any) -> Any:
        args = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
        return self._orbax.restore(path, args=ocp.args.Composite(**args))
