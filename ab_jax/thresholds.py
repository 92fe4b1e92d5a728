"""Groups of magnitudes and their means: the levels of least squared error where there are few.

Ternary codes split the magnitudes of a block into a lower group, which becomes 0, and an upper one,
which becomes its mean; two signs +-v1 +-v2 split them into two groups that both become their means.
The threshold of either is found without a sort, as exactly as float32 sums can tell, from the
excess of the magnitudes over a threshold t, R(t) = sum max(|w| - t, 0). With the best levels for
it, a threshold takes off the squared error

    ternary      4 t R(t)
    two signs    4 n r (r + t - mean |w|)    beside what one level does, where r = R(t) / n

(set the derivative in the levels to zero). R is convex, so it lies below its chord between two
thresholds, and the product of two lines bounds what any threshold between these can take off.
Intervals that cannot hold the best one are dropped, and the rest is divided again, until it holds a
magnitude or two.

Sums over the weights are all that is needed: they are read once a round, and where a block lies on
several devices, these add up their sums.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.scale_fits import or_one

# Thresholds in a round; with more than 64, XLA on CPUs sums on one core.
_EDGES, _ROUNDS = 40, 3
# The largest magnitude of a block in what its weights are measured in. Over any magnitude it is a
# normal number, which 1 is not.
UNITS = 16.0
# Far steeper than any two magnitudes are near.
_STEEP = 2.0**60
# By how much sums of float32 may be off, relative.
_ROUNDING = 2.0**-20

# What a threshold takes off is the product of two lines, given thresholds, excess and mean.
Lines = Callable[[Array, Array, Array], tuple[Array, Array]]


def ternary(w: Array, magnitude: Array, axes: tuple[int, ...]) -> Array:
    """The scale of least squared error for codes -1, 0 and +1.

    Args:
      w: floats.
      magnitude: the largest of each block (`scale_fits.magnitude`).
      axes: those of `w` that run inside a block; the result keeps them with size 1.
    """
    w, magnitude = jax.lax.stop_gradient((w[None], magnitude[None]))
    axes = tuple(axis + 1 for axis in axes)
    t, _ = _best_threshold(w, magnitude, axes, 0.5, lambda t, excess, mean: (t, excess))
    fraction, total = above(w, magnitude, t, axes)
    # A mean of the largest may round to more. Constants come before the bound, or compilers move
    # them behind the product with the magnitude, which then overflows.
    return (jnp.minimum(total / or_one(fraction) / UNITS, 1) * magnitude)[0]


def two_signs(w: Array, magnitude: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The scales `v1 >= v2 >= 0` of least squared error for the levels +-v1 +-v2.

    Of two thresholds far apart that are nearly as good, either may be taken.

    Args:
      w, magnitude, axes: as for `ternary`.

    Returns:
      The two scales over the largest magnitude.
    """
    w, magnitude = jax.lax.stop_gradient((w[None], magnitude[None]))
    axes = tuple(axis + 1 for axis in axes)
    t, mean = _best_threshold(
        w, magnitude, axes, 1.0, lambda t, excess, mean: (excess, excess + (t - mean))
    )
    fraction, total = above(w, magnitude, t, axes)
    low, high = (
        # Half of each mean. That of the smallest may round to less than 0, of the largest to more
        # than it. No constant comes after these bounds: compilers would move it (`ternary`).
        jnp.minimum(jnp.maximum(part, 0) / or_one(of) / (2 * UNITS), 0.5)
        for part, of in ((mean - total, 1 - fraction), (total, fraction))
    )
    # Where all magnitudes are the same, one group is empty. A fraction of all may round to less.
    all_above = fraction > 1 - 0.5 / _count(w, axes)
    low, high = jnp.where(all_above, high, low), jnp.where(fraction == 0, low, high)
    return (high + low)[0], (high - low)[0]


def _best_threshold(
    w: Array, magnitude: Array, axes: tuple[int, ...], end: float, lines: Lines
) -> tuple[Array, Array]:
    """Between 0 and this part of the largest magnitude, that which takes off most; and the mean."""
    # Of the data: what a loop hands on lies on the devices as the data does.
    low = jnp.minimum(magnitude, 0)
    share = np.linspace(0, 1, _EDGES, dtype=w.dtype).reshape(-1, *(1,) * (w.ndim - 1))
    mean = mean_excess(w, magnitude, low, axes)

    def narrowed(_: int, found: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high = found[:2]
        t = low + (high - low) * share
        excess = mean_excess(w, magnitude, t, axes)
        one, other = lines(t, excess, mean)
        taken_off = jnp.max(one * other, axis=0, keepdims=True)
        # What lies below the rounding of a mean is nothing.
        enough = jnp.maximum(taken_off * (1 - _ROUNDING), mean * mean * _ROUNDING)
        may_hold = _most_between(one, other) >= enough
        first, last = jax.lax.reduce(
            (jnp.where(may_hold, t[:-1], UNITS), jnp.where(may_hold, t[1:], 0)),
            (np.asarray(UNITS, w.dtype), np.zeros((), w.dtype)),
            lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
            (0,),
        )
        first, last = first[None], last[None]
        best = jnp.where(one * other == taken_off, t, jnp.inf)
        best = jnp.min(best, axis=0, keepdims=True)
        return jnp.where(first < last, first, low), jnp.where(first < last, last, high), best

    *_, best = jax.lax.fori_loop(0, _ROUNDS, narrowed, (low, low + end * UNITS, low))
    return best, mean


def _count(w: Array, axes: tuple[int, ...]) -> int:
    """How many weights a block has."""
    return math.prod(w.shape[axis] for axis in axes)


def mean_excess(w: Array, magnitude: Array, t: Array, axes: tuple[int, ...]) -> Array:
    """The mean of max(|w| - t, 0), for each of some thresholds, in units of the block."""
    nothing = jnp.minimum(t, 0)
    # Of the shape of the thresholds, or XLA on CPUs would write out the product.
    y = jnp.abs(w * (UNITS / or_one(magnitude + nothing)))
    return jnp.sum(jnp.maximum(y - t, nothing), axes, keepdims=True) * (1 / _count(w, axes))


def _most_between(one: Array, other: Array) -> Array:
    """The most that the product of two lines has between each two neighbouring edges.

    Args:
      one, other: [edges, ...]; the product of their slopes is not positive, so that it is concave.
    """
    a, b, c, d = one[:-1], jnp.diff(one, axis=0), other[:-1], jnp.diff(other, axis=0)
    slope, curvature = a * d + b * c, -b * d
    u = jnp.minimum(jnp.maximum(slope / or_one(2 * curvature), 0), 1)
    u = jnp.where(curvature > 0, u, jnp.where(slope > 0, jnp.ones_like(u), 0))
    return (a + u * b) * (c + u * d)


def above(w: Array, magnitude: Array, t: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The fraction of magnitudes above each threshold, and their sum over the number of all.

    Args:
      w, magnitude: [1, ...].
      t: thresholds [thresholds, ...] in units of the block.
      axes: those of `w` inside a block.

    Returns:
      Two arrays of the shape of `t`; the sum is of those above, over the number of all weights.
    """
    # Both in one pass: what exceeds a threshold, and the same steeper and cut off, which counts.
    nothing = jnp.minimum(magnitude, 0)
    steep = np.repeat([1.0, _STEEP], t.shape[0]).reshape(-1, *(1,) * (t.ndim - 1))
    most = np.repeat([_STEEP, 1.0], t.shape[0]).reshape(steep.shape)
    both_t = jnp.concatenate([t, t])
    y = jnp.abs(w * (UNITS / or_one(magnitude + jnp.minimum(both_t, 0) * 0)))
    beyond = (y - both_t) * (nothing + steep.astype(w.dtype))
    counted = jnp.minimum(jnp.maximum(beyond, nothing), nothing + most.astype(w.dtype))
    both = jnp.sum(counted, axes, keepdims=True) * (1 / _count(w, axes))
    excess, fraction = both[: t.shape[0]], both[t.shape[0] :]
    return fraction, excess + t * fraction
