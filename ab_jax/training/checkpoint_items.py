"""The items of a checkpoint: parts of the state and of its run, and whether a model fits."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.files import read_regular, write_whole
from ab_jax.linen import RANGES, ranges_by_address
from ab_jax.training.distributed import to_global
from ab_jax.training.metrics_file import Seal
from ab_jax.training.state import TrainState

# The network is an item of its own, so that another run can start from it whatever its optimizer.
FIELDS = {
    "network": ("params", "model_state"),
    "rest": ("step", "opt_state", "key"),
    "scales": ("scales",),  # of runs that train them
    "fits": ("fits",),  # of runs that do not fit at each step
}


def items_of(state: TrainState) -> dict[str, dict[str, Any]]:
    """What each item of a checkpoint holds of a state."""
    return {
        item: {name: getattr(state, name) for name in names}
        for item, names in FIELDS.items()
        if item not in ("scales", "fits") or getattr(state, item) is not None
    }


def without_ranges(network: dict[str, Any]) -> dict[str, Any]:
    """The item `network` but for the ranges of its activations."""
    kept = {name: x for name, x in network["model_state"].items() if name != RANGES}
    return {**network, "model_state": kept}


def with_ranges_of(stored: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Where an item `network` is restored to, with the ranges that are stored.

    Orbax restores all of an item or nothing, and their names may be those of an older version.

    Args:
      stored: its shapes and dtypes.
      target: as `where_to` returns it, of a state of today.
    """
    ranges = stored["model_state"].get(RANGES)
    target = without_ranges(target)
    if ranges is None:
        return target
    there = where_to(jax.tree.map(jnp.asarray, host_arrays(ranges)))
    return {**target, "model_state": {**target["model_state"], RANGES: there}}


def with_todays_ranges(network: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """An item `network` with the ranges by the names of today, fixed ones as `like` has them."""
    ranges, wanted = (item.get("model_state", {}).get(RANGES) for item in (network, like))
    if ranges is None or wanted is None:
        return network
    of_today = ranges_by_address(ranges, wanted)
    return {**network, "model_state": {**network["model_state"], RANGES: of_today}}


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


_NAME = "run.json"


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stood when a checkpoint was written. None of it is known of older ones.

    Attributes:
      metrics: the seal of the lines up to there; None where another process wrote them.
      alphas: by the path of each quantized parameter, and of the activations.
      teacher: the digest of its variables; None where there is none.
    """

    metrics: Seal | None = None
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    teacher: str | None = None

    def write(self, checkpoint: Path) -> None:
        """Into the directory of a checkpoint that has no manifest yet.

        Raises:
          OSError: it cannot be written; names the path and the fix.
        """
        write_whole(checkpoint / _NAME, json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def read(cls, checkpoint: Path) -> "Standing":
        """From a checkpoint that is whole by its manifest."""
        data = read_regular(checkpoint / _NAME)
        return cls() if data is None else cls(**json.loads(data))


# Those that a line of metrics has the means of, and the sum, where there are any.
_METRICS = ("loss", "accuracy", "not_finite_inputs")


@dataclasses.dataclass(frozen=True)
class Interval:
    """The steps since the last evaluation, of which the next one makes its line of metrics.

    Attributes:
      metrics: float32 [steps] by name.
      codes: of the quantized parameters at the last evaluation, in the order of the tree.
    """

    metrics: dict[str, np.ndarray]
    codes: list[np.ndarray]

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, Any]], codes: list[np.ndarray]) -> "Interval":
        """From what each step returned, one at least."""
        names = [name for name in _METRICS if any(name in step for step in steps)]
        metrics = {n: np.asarray([step.get(n, 0) for step in steps], np.float32) for n in names}
        return cls(metrics, codes)

    def steps(self) -> list[dict[str, Any]]:
        """The inverse of `of`, for the metrics that are kept."""
        columns = zip(*self.metrics.values(), strict=True)
        return [dict(zip(self.metrics, values, strict=True)) for values in columns]

    def to_tree(self) -> dict[str, Any]:
        """As dictionaries of arrays, none of them empty, which is what Orbax can write."""
        codes = {str(i): codes for i, codes in enumerate(self.codes)}
        return {"metrics": self.metrics, **({"codes": codes} if codes else {})}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "Interval":
        """The inverse of `to_tree`."""
        codes = tree.get("codes", {})
        return cls(
            metrics={name: np.asarray(values) for name, values in tree["metrics"].items()},
            codes=[np.asarray(codes[str(i)]) for i in range(len(codes))],
        )
