"""Checkpoints of a training run, by Orbax: the last few states, to resume from or to start from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ab_jax.quantized_inputs import RANGES
from ab_jax.training.state import TrainState

# The network is an item of its own, so that another run can start from it whatever its optimizer.
_NETWORK_FIELDS = ("params", "model_state")
_REST_FIELDS = ("step", "opt_state", "key")


class Checkpoints:
    """The checkpoints in a directory, named by their step.

    A context manager: leaving it waits for the write under way.

    Args:
      directory: created when missing.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path, *, keep: int = 1) -> None:
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("network", "rest")}
        self._manager = ocp.CheckpointManager(
            self._directory, item_handlers=handlers, options=options
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Write the state in the background; a step that is there already is left as it is."""
        step = int(state.step)
        if step == self.latest_step:
            return
        items = {
            "network": ocp.args.StandardSave(_fields(state, _NETWORK_FIELDS)),
            "rest": ocp.args.StandardSave(_fields(state, _REST_FIELDS)),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState) -> TrainState:
        """The newest state.

        Args:
          like: a state of the same structure, shapes and dtypes.

        Raises:
          FileNotFoundError: there is no checkpoint.
        """
        items = {
            "network": ocp.args.StandardRestore(_abstract(_fields(like, _NETWORK_FIELDS))),
            "rest": ocp.args.StandardRestore(_abstract(_fields(like, _REST_FIELDS))),
        }
        restored = self._manager.restore(self._existing_step(), args=ocp.args.Composite(**items))
        return TrainState(**restored["network"], **restored["rest"])

    def restore_network(self, like: TrainState) -> TrainState:
        """`like` with the newest checkpoint's parameters and model state.

        Ranges of activations that only one of the two networks has stay as they are in `like`: a
        network may start from one whose activations were not quantized, or otherwise.

        Raises:
          FileNotFoundError: there is no checkpoint. ValueError: a network of another structure or
            of other shapes.
        """
        step = self._existing_step()
        stored = self._manager.item_metadata(step)["network"].tree
        wanted = _fields(like, _NETWORK_FIELDS)
        self._check_same_shapes(_without_ranges(stored), _without_ranges(wanted))
        network = _abstract(_without_ranges(wanted))
        if RANGES in stored["model_state"]:  # Orbax restores all of an item or nothing
            network["model_state"][RANGES] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored["model_state"][RANGES]
            )
        args = ocp.args.Composite(network=ocp.args.StandardRestore(network))
        restored = self._manager.restore(step, args=args)["network"]
        ranges = wanted["model_state"].get(RANGES)
        if _shapes(restored["model_state"].get(RANGES)) != _shapes(ranges):
            restored = _without_ranges(restored)
            if ranges is not None:
                restored["model_state"][RANGES] = ranges
        return dataclasses.replace(like, **restored)

    def _existing_step(self) -> int:
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(f"There is no checkpoint in {self._directory}.")
        return step

    def _check_same_shapes(self, stored: Any, wanted: Any) -> None:
        have, want = _shapes(stored), _shapes(wanted)
        differing = [path for path in sorted({*have, *want}) if have.get(path) != want.get(path)]
        if differing:
            path = differing[0]
            raise ValueError(
                f"The network in {self._directory} does not fit the model: {path} is "
                f"{have.get(path, 'absent')} there and {want.get(path, 'absent')} in the model "
                f"({len(differing)} leaves differ). Give both runs the same model flags."
            )


def _fields(state: TrainState, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(state, name) for name in names}


def _without_ranges(network: dict[str, Any]) -> dict[str, Any]:
    kept = {name: x for name, x in network["model_state"].items() if name != RANGES}
    return {**network, "model_state": kept}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
