"""What rules do to each parameter, as a table: `print(describe(params, rules))`."""

import dataclasses
import math
from typing import Any

import jax

from ab_jax.quantizers import Quantizer
from ab_jax.rules import Rules, assigned, check_fits


@dataclasses.dataclass(frozen=True)
class Described:
    """What the rules do to one parameter; `bytes_after` counts packed codes and their scales.

    They are those of a packed file, where codes of three levels take 1.6 bits.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    quantizer: Quantizer | None
    bytes_before: int
    bytes_after: int


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
        table: list[tuple[str, ...]] = [
            ("path", "shape", "rule", "axis", "quantizer", "bits", "bytes", "after")
        ]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            sizes = f"{row.bytes_before:,}", f"{row.bytes_after:,}"
            table.append((row.path, shape, row.rule, *_cells(row.quantizer), *sizes))
        totals = self.bytes_before, self.bytes_after
        table.append(("total", "", "", "", "", "", *(f"{total:,}" for total in totals)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column >= 5 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in table
        )


def describe(params: Any, rules: Rules) -> Description:
    """What `rules` do to each parameter: path, shape, rule, axis, bits, bytes before and after.

    Shapes and dtypes are all it needs: the result of `jax.eval_shape` will do for `params`.

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
        rows.append(Described(path, shape, pattern, quantizer, before, after))
    return Description(tuple(rows))


def quantized_paths(params: Any, rules: Rules) -> list[str]:
    """Paths of the parameters that a rule quantizes, in the order of the tree.

    Shapes and dtypes are all it needs: the result of `jax.eval_shape` will do for `params`.

    Raises:
      ValueError, TypeError: as `blend`.
    """
    return [row.path for row in describe(params, rules).rows if row.quantizer is not None]


def _cells(quantizer: Quantizer | None) -> tuple[str, str, str]:
    if quantizer is None:
        return "", "", ""
    axis = "tensor" if quantizer.axis is None else str(quantizer.axis)
    if quantizer.group_size is not None:
        axis += f", groups of {quantizer.group_size} on {quantizer.group_axis}"
    return axis, type(quantizer).__name__, str(quantizer.bits)


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize if hasattr(leaf, "dtype") else 0
