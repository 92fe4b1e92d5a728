"""Sizes of open axes: numbers that are known once an input is there, such as that of a batch.

A function is traced at two sizes of each open axis, in all combinations (`OpenAxes.corners`). What
differs from one of these to the next is a `Size`, known by its values there; `terms` says what it
is of the open axes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Gaps are primes above the usual strides, others from axis to axis: what a stride leaves over
# differs between two sizes, in padding too, and quotients are on no line. Later axes are longer.
_TRACED_AT = ((7, 12), (13, 20), (23, 34), (41, 54))
_HIGHEST_POWER = 2

#: A product of open axes by their names, and how often it is counted; no names: a plain number.
Terms = Mapping[tuple[str, ...], int]


class UnknownSizeError(ValueError):
    """A size that is no sum of products of open axes."""


@dataclasses.dataclass(frozen=True)
class OpenAxes:
    """Open axes, and what they are traced at.

    Attributes:
      names: of the axes.
      sizes: two for each.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, names: Sequence[str], sizes: Mapping[str, tuple[int, int]]) -> "OpenAxes":
        """Axes of these names.

        Args:
          names: of the axes.
          sizes: what to trace some of them at, where not any size will do.

        Raises:
          ValueError: sizes of an axis that there is not, or that are no two positive numbers; more
            axes than there are sizes to tell them apart.
        """
        for name, given in sizes.items():
            if name not in names:
                raise ValueError(f"There is no open axis {name!r} to trace at {given}.")
            pair = given if isinstance(given, (tuple, list)) else ()
            if len(pair) != 2 or len(set(pair)) != 2 or min(pair) < 1:
                raise ValueError(
                    f"The axis {name!r} is to be traced at two different positive sizes, not at "
                    f"{given}."
                )
        if len(names) > len(_TRACED_AT):
            raise ValueError(
                f"There are {len(names)} open axes, {', '.join(names)}. At most "
                f"{len(_TRACED_AT)} can be."
            )
        primes = dict(zip(names, _TRACED_AT, strict=False))
        return cls(tuple(names), tuple(sizes.get(name, primes[name]) for name in names))

    @functools.cached_property
    def corners(self) -> tuple[dict[str, int], ...]:
        """The sizes of each trace, by name; the first axis changes slowest."""
        return tuple(
            dict(zip(self.names, sizes, strict=True)) for sizes in itertools.product(*self.sizes)
        )

    def size(self, values: Sequence[int]) -> "Dim":
        """What has these values at the corners: a number, where they are all one."""
        return int(values[0]) if len(set(values)) == 1 else Size(tuple(map(int, values)), self)

    def joined(self, of_corners: Sequence[Any]) -> Any:
        """Parameters of a primitive: what is equal at all corners, and tuples with `Size`s.

        Raises:
          ValueError: they differ in something else than numbers.
        """
        first = of_corners[0]
        if all(_equal(other, first) for other in of_corners[1:]):
            return first
        if isinstance(first, (tuple, list)):
            if len({len(other) for other in of_corners}) == 1:
                parts = [self.joined(parts) for parts in zip(*of_corners, strict=True)]
                return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
        elif isinstance(first, (int, np.integer)) and not isinstance(first, bool):
            return self.size(of_corners)
        raise ValueError(f"{first} at one size of the open axes is {of_corners[-1]} at another")


@dataclasses.dataclass(frozen=True)
class Size:
    """A number that depends on open axes.

    Attributes:
      values: at the corners of the axes.
      axes: the open axes.
    """

    values: tuple[int, ...]
    axes: OpenAxes

    @functools.cached_property
    def terms(self) -> Terms:
        """The number as a sum of products of open axes.

        Raises:
          UnknownSizeError: it is no such sum.
        """
        found = self._product() or self._sum()
        if found is None:
            raise UnknownSizeError(
                f"A size is {self._listed()}: no sum of products of these. Trace at other sizes "
                f"(sizes=), or leave the axis closed."
            )
        return found

    def _product(self) -> Terms | None:
        for powers in itertools.product(range(_HIGHEST_POWER + 1), repeat=len(self.axes.names)):
            names = tuple(
                name
                for name, power in zip(self.axes.names, powers, strict=True)
                for _ in range(power)
            )
            products = [math.prod(corner[n] for n in names) for corner in self.axes.corners]
            factors = {divmod(v, p) for v, p in zip(self.values, products, strict=True)}
            if len(factors) == 1:
                ((factor, rest),) = factors
                if factor and not rest:
                    return {names: factor}
        return None

    def _sum(self) -> Terms | None:
        """By the values at the corners alone: what is no such sum need not show there."""
        names = self.axes.names
        kept = list(itertools.product((False, True), repeat=len(names)))
        products = [tuple(itertools.compress(names, mask)) for mask in kept]
        rows = [[math.prod(corner[n] for n in p) for p in products] for corner in self.axes.corners]
        found = np.linalg.solve(np.array(rows, float), np.array(self.values, float)).round()
        terms = {p: int(c) for p, c in zip(products, found, strict=True) if c}
        if any(
            evaluated(terms, c) != v for c, v in zip(self.axes.corners, self.values, strict=True)
        ):
            return None
        # A square grows faster than the line through two of its values, which is negative at 1.
        steep = any(abs(count) > 1 for product, count in terms.items() if product)
        return None if steep and sum(terms.values()) < 0 <= min(self.values) else terms

    def _listed(self) -> str:
        return ", ".join(
            f"{value} at {' and '.join(f'{n}={s}' for n, s in corner.items())}"
            for corner, value in zip(self.axes.corners, self.values, strict=True)
        )

    def __str__(self) -> str:
        try:
            terms = self.terms
        except UnknownSizeError:
            return f"({self._listed()})"
        return " + ".join(
            "*".join([*([str(count)] if count != 1 or not names else []), *names])
            for names, count in terms.items()
        )

    def _with(self, other: Any, function: Callable[[int, int], int]) -> Any:
        if not isinstance(other, (int, np.integer, Size)):
            return NotImplemented
        others = other.values if isinstance(other, Size) else (int(other),) * len(self.values)
        return self.axes.size([function(a, b) for a, b in zip(self.values, others, strict=True)])

    def __add__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a * b)

    __radd__ = __add__
    __rmul__ = __mul__


#: A size of an axis.
Dim = int | Size
Shape = tuple[Dim, ...]


def evaluated(terms: Terms, sizes: Mapping[str, int]) -> int:
    """A sum of products at these sizes of the open axes."""
    return sum(count * math.prod(sizes[name] for name in names) for names, count in terms.items())


def is_closed(found: Any) -> bool:
    """Whether no size of an open axis is in a shape, or in parameters of a primitive."""
    if isinstance(found, Mapping):
        return all(map(is_closed, found.values()))
    if isinstance(found, (tuple, list)):
        return all(map(is_closed, found))
    return not isinstance(found, Size)


def _equal(one: Any, other: Any) -> bool:
    both_nan = isinstance(one, float) and one != one and other != other
    return both_nan or bool(np.all(one == other))
