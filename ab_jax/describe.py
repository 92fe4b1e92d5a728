"""What rules do to each parameter, as a table: `print(describe(params, rules))`."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.quantizers import Quantizer
from ab_jax.rules import Rules, assigned, check_fits

# Of a slice that loses more than this share, less is kept than lost.
_MOSTLY_LOST = 0.5


@dataclasses.dataclass(frozen=True)
class Described:
    """What the rules do to one parameter; `bytes_after` counts packed codes and their scales.

    They are those of a packed file, where codes of three levels take 1.6 bits.

    Attributes:
      error: squared error over the squares of the weights; None: not known, as of a shape alone.
      worst: the largest such error of a slice along an axis that has no scales of its own, and that
        axis; None: not known, or there is no such axis.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    quantizer: Quantizer | None
    bytes_before: int
    bytes_after: int
    error: float | None = dataclasses.field(default=None, compare=False)
    worst: tuple[float, int] | None = dataclasses.field(default=None, compare=False)

    @property
    def note(self) -> str:
        """What speaks against this rule, if anything does."""
        if self.quantizer is None:
            return ""
        if sum(size > 1 for size in self.shape) < 2:
            return "a vector: a norm or a bias?"
        if self.worst is not None and self.worst[0] > _MOSTLY_LOST:
            return f"a slice of axis {self.worst[1]} is mostly lost"
        return ""


@dataclasses.dataclass(frozen=True)
class Description:
    """A row for each parameter. `print` shows it as a table."""

    rows: tuple[Described, ...]

    @property
    def parameters(self) -> int:
        """How many numbers there are in all."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def bytes_before(self) -> int:
        """Of all parameters as they are trained."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Of all parameters with packed codes and their scales."""
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        rows = self.rows
        cells = [_cells(row.quantizer) for row in rows]
        columns = {
            "path": [*(row.path for row in rows), "total"],
            "shape": ["x".join(map(str, row.shape)) or "scalar" for row in rows],
            "rule": [row.rule for row in rows],
            **{name: [of_row[name] for of_row in cells] for name in ("axis", "quantizer", "bits")},
            "bytes": [f"{n:,}" for n in (*(r.bytes_before for r in rows), self.bytes_before)],
            "after": [f"{n:,}" for n in (*(r.bytes_after for r in rows), self.bytes_after)],
        }
        if any(row.error is not None for row in rows):
            columns["error"] = [_told(row.error) for row in rows]
            columns["worst"] = [_told(row.worst and row.worst[0]) for row in rows]
        if any(row.note for row in rows):
            columns[""] = [row.note for row in rows]
        return table(columns, numbers=("bits", "bytes", "after", "error", "worst"))


def table(columns: Mapping[str, Sequence[str]], numbers: Collection[str] = ()) -> str:
    """Columns of text side by side, by their heads; those of `numbers` end in line."""
    lines = list(
        itertools.zip_longest(*([h, *cells] for h, cells in columns.items()), fillvalue="")
    )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if head in numbers else cell.ljust(width)
            for head, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def describe(params: Any, rules: Rules, *, errors: bool = True) -> Description:
    """What `rules` do to each parameter: path, shape, rule, axis, bits, bytes before and after.

    Shapes and dtypes are all it needs: the result of `jax.eval_shape` will do for `params`. Of
    weights themselves it also tells how much is lost, of all and of the worst slice along an axis
    without scales of its own: a stack of layers that share scales may lose its smallest.

    Args:
      params, rules: as for `blend`.
      errors: whether to quantize the weights, if there are any, to see what is lost.

    Raises:
      ValueError, TypeError: as `blend`.
    """
    leaves, chosen, _ = assigned(params, rules)
    rows = []
    for (path, leaf), index in zip(leaves, chosen, strict=True):
        pattern, quantizer = rules.rules[index]
        before = after = _nbytes(leaf)
        if quantizer is not None:
            check_fits(path, leaf, pattern, quantizer)
            quantized = jax.eval_shape(quantizer.quantize, leaf)
            after = quantized.packed_size()
            after += _nbytes(quantized.scale) + _nbytes(quantized.zero_point)
        shape = tuple(getattr(leaf, "shape", ()))
        error = worst = None
        if quantizer is not None and errors and _is_concrete(leaf):
            error, worst = _errors(leaf, quantizer)
        rows.append(Described(path, shape, pattern, quantizer, before, after, error, worst))
    return Description(tuple(rows))


def quantized_paths(params: Any, rules: Rules) -> list[str]:
    """Paths of the parameters that a rule quantizes, in the order of the tree.

    Shapes and dtypes are all it needs: the result of `jax.eval_shape` will do for `params`.

    Raises:
      ValueError, TypeError: as `blend`.
    """
    return [
        row.path for row in describe(params, rules, errors=False).rows if row.quantizer is not None
    ]


def _is_concrete(leaf: Any) -> bool:
    if isinstance(leaf, Array):
        return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray)


def _errors(w: Any, quantizer: Quantizer) -> tuple[float, tuple[float, int] | None]:
    """The error of a weight, and the worst of a slice, with its axis."""
    value = quantizer.quantize(w).dequantize()
    sizes = quantizer.scale_shape(w.shape)
    of_all, of_slices = _relative_errors(w, value)
    shared = [axis for axis, size in enumerate(w.shape) if size > 1 and sizes[axis] == 1]
    of_axes = ((float(jnp.max(of_slices[axis])), axis) for axis in shared)
    return float(of_all), max(of_axes, default=None)


@jax.jit
def _relative_errors(w: Array, value: Array) -> tuple[Array, list[Array]]:
    """Squared error over squares: of all, and along each axis of each slice."""
    w, value = w.astype(jnp.float32), value.astype(jnp.float32)
    # Parts of the largest of a slice, so that no square overflows or vanishes.
    largest = jnp.max(jnp.abs(w))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    lost, squares = jnp.square((w - value) / unit), jnp.square(w / unit)

    def over(axes: tuple[int, ...]) -> Array:
        kept = jnp.sum(squares, axes)
        return jnp.sum(lost, axes) / jnp.where(kept > 0, kept, 1)

    axes = tuple(range(w.ndim))
    return over(axes), [over(axes[:i] + axes[i + 1 :]) for i in axes]


def _told(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def _cells(quantizer: Quantizer | None) -> dict[str, str]:
    if quantizer is None:
        return {"axis": "", "quantizer": "", "bits": ""}
    axis = "tensor" if quantizer.axis is None else str(quantizer.axis)
    if quantizer.group_size is not None:
        axis += f", groups of {quantizer.group_size} on {quantizer.group_axis}"
    return {"axis": axis, "quantizer": type(quantizer).__name__, "bits": str(quantizer.bits)}


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize if hasattr(leaf, "dtype") else 0
