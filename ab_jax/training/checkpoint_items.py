"""The items of a checkpoint: which parts of a state each holds, and whether a model fits them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ab_jax.quantized_inputs import RANGES
from ab_jax.training.distributed import to_global
from ab_jax.training.state import TrainState

# The network is an item of its own, so that another run can start from it whatever its optimizer.
FIELDS = {
    "network": ("params", "model_state"),
    "rest": ("step", "opt_state", "key"),
    "scales": ("scales",),  # of runs that train them
}


def items_of(state: TrainState) -> dict[str, dict[str, Any]]:
    """What each item of a checkpoint holds of a state."""
    return {
        item: {name: getattr(state, name) for name in names}
        for item, names in FIELDS.items()
        if item != "scales" or state.scales is not None
    }


def without_ranges(network: dict[str, Any]) -> dict[str, Any]:
    """The item `network` but for the ranges of its activations."""
    kept = {name: x for name, x in network["model_state"].items() if name != RANGES}
    return {**network, "model_state": kept}


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def where_to(tree: Any) -> Any:
    """Where the arrays are restored to: of several processes, onto the devices of all."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), to_global(tree)
    )


def host_arrays(tree: Any) -> Any:
    """Where they are restored to when NumPy arrays are wanted, from a tree of shapes and dtypes."""
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)


def check_same_shapes(directory: Path, stored: Any, wanted: Any) -> None:
    """Refuse a stored tree that does not fit the model.

    Args:
      directory: of the checkpoints, for the message.
      stored, wanted: trees of arrays, or of their shapes.

    Raises:
      ValueError: names the first leaf that differs.
    """
    have, want = shapes(stored), shapes(wanted)
    differing = [path for path in sorted({*have, *want}) if have.get(path) != want.get(path)]
    if differing:
        path = differing[0]
        raise ValueError(
            f"The network in {directory} does not fit the model: {path} is "
            f"{have.get(path, 'absent')} there and {want.get(path, 'absent')} in the model "
            f"({len(differing)} leaves differ). Give both runs the same model flags."
        )
