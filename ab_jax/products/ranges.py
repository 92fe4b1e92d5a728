"""Ranges of the inputs of products, and what a pass makes of its measurements.

A pass is one evaluation of the function. It asks for the largest measurement of an input in it: a
product in a loop, or called several times under one address, sees those up to its own. Momentum is
between passes. A measurement that is not finite leaves the range alone, and is counted.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike


class Range(NamedTuple):
    """The range of an input; in a scan over layers each entry has an axis in front, for these.

    Attributes:
      limit: float32, the end of the range; 0: never measured, and the input stays as it is.
      cut: float32, the share of the input's magnitudes that lay below an unsigned range in the last
        pass that measured: what was lost of the input.
      not_finite: int32, how many measurements of the last pass were not finite.
    """

    limit: Array
    cut: Array
    not_finite: Array

    @classmethod
    def of(cls, limit: float, shape: tuple[int, ...] = ()) -> "Range":
        """Of an input that was not seen yet; limit 0: that was not measured yet."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(zeros + jnp.float32(limit), zeros, jnp.zeros(shape, jnp.int32))


class InPass(NamedTuple):
    """A range while a pass is under way.

    Attributes:
      start: before the pass; 0: never measured.
      largest: of this pass's measurements; -1: there are none.
      limit: the range that follows from both.
      cut: the largest share that lay below the range, that of the pass before until there is a
        measurement; None: nobody asks for it, as nothing can.
      not_finite: int32, how many measurements were not.
    """

    start: Array
    largest: Array
    limit: Array
    cut: Array | None
    not_finite: Array

    @classmethod
    def of(cls, limit: ArrayLike, cut: Array | None = None) -> "InPass":
        """Before the first measurement."""
        limit = lax.convert_element_type(limit, jnp.float32)
        none: Any = np.zeros(limit.shape, np.float32)  # constants take no tracing
        # A range that is not finite counts as none: files may hold such.
        start = lax.select(lax.is_finite(limit), limit, none)
        return cls(start, none - 1, start, cut, none.astype(np.int32))

    def after(
        self, measured: Array, momentum: float, below_and_all: tuple[Array, Array] | None = None
    ) -> "InPass":
        """After one more, of `ActivationQuantizer.measure_with_cut`."""
        before = self.start, self.largest, self.not_finite
        shares = below_and_all and (self.cut, *below_and_all)
        return InPass(self.start, *_after(*before, measured, momentum, shares))

    def parted(self, axes: tuple[str, ...]) -> "InPass":
        """Before devices along these axes go ways of their own; range and start stay in common."""
        # A sum, so that JAX knows them to vary: whether there are meshes whose values it checks, or
        # they vary already, `jax.lax.pcast` would have to be told.
        here = 0 * lax.axis_index(axes)
        largest, cut, count = jax.tree.map(
            lambda entry: entry + here.astype(entry.dtype),
            (self.largest, self.cut, self.not_finite),
        )
        return InPass(self.start, largest, self.limit, cut, count)

    def met(self, axes: tuple[str, ...], *, is_mean: bool) -> "InPass":
        """After that: the largest of devices, or the mean of those that measured; no range yet."""
        if is_mean:
            some = (self.largest >= 0).astype(jnp.float32)
            total, count = lax.psum((some * self.largest, some), axes)
            largest = jnp.where(count > 0, total / jnp.maximum(count, 1), -1)
        else:
            largest = lax.pmax(self.largest, axes)
        cut = self.cut
        if cut is not None:  # of those that measured, if some did
            cut = lax.pmax(jnp.where((self.largest < 0) & (largest >= 0), 0, cut), axes)
        count = lax.pmax(self.not_finite, axes)
        return InPass(self.start, largest, self.limit, cut, count)

    def ranged(self, momentum: float) -> "InPass":
        """With the range that follows from the largest measurement."""
        return self._replace(limit=_asked(self.start, self.largest, momentum))

    def ended(self, before: Range) -> Range:
        """After the pass; `before` it."""
        cut = self.cut
        if cut is None:
            none: Any = np.zeros(self.limit.shape, np.float32)
            cut = lax.select(lax.lt(self.largest, np.float32(0)), before.cut, none)
        return Range(self.limit, cut, self.not_finite)


# Compiled apart, since it is traced once for all inputs of a network; with what it reads alone,
# since each operand takes time at each call.
@functools.partial(jax.jit, static_argnames="momentum")
def _after(
    start: Array,
    largest: Array,
    not_finite: Array,
    measured: Array,
    momentum: float,
    shares: tuple[Array, Array, Array] | None,
) -> tuple[Array, Array, Array | None, Array]:
    """The largest measurement, the range, the cut and the count after one more measurement."""
    zero, one = np.arange(2, dtype=np.float32)
    finite = lax.is_finite(measured)
    cut = None
    if shares is not None:
        cut, below, both = shares
        share = lax.div(lax.abs(below), lax.select(lax.gt(both, zero), both, one))
        largest_share = lax.select(lax.lt(largest, zero), share, lax.max(cut, share))
        cut = lax.select(finite, largest_share, cut)
    largest = lax.select(finite, lax.max(largest, measured), largest)
    one_more = lax.convert_element_type(lax.bitwise_not(finite), jnp.int32)
    return largest, _asked(start, largest, momentum), cut, lax.add(not_finite, one_more)


def _asked(start: Array, largest: Array, momentum: float) -> Array:
    """The range that follows from the largest measurement."""
    # Selected before the sum, not after it, which would let XLA round it otherwise: a run that
    # is resumed shall be the same bit for bit. Without a measurement 1 and 0 keep the start.
    zero, one = np.arange(2, dtype=np.float32)
    none = lax.lt(largest, zero)
    kept = lax.select(none, one, np.float32(momentum))
    added = lax.select(none, zero, np.float32(1 - momentum))
    asked = lax.select(none, start, largest)
    moved = lax.add(lax.mul(kept, start), lax.mul(added, asked))
    return lax.select(lax.gt(start, zero), moved, asked)
