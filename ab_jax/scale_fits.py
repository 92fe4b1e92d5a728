"""Scale fits: the scale under which blocks of weights lose the least squared error.

A block is the weights that share one scale. In all functions `w` is an array of floats whose `axes`
run inside a block; results have one entry a block and keep those axes with size 1.

The fits expect blocks whose largest magnitude is 1, as `normalize` makes them: then no sum and no
square overflows or vanishes, whatever the range of the weights. NaN in a block makes its scale NaN.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# The lowest and the highest level in units of the scale: integers, or one entry a block.
Levels = tuple[float | Array, float | Array]

# Below so many times the smallest normal number a scale (magnitude / 127) may be no normal number.
# CPUs and accelerators flush others to zero, and a division by it would no longer be finite.
_HEADROOM = 2.0**8

# Scales that `least_squares` tries before it refines the best one.
_STARTS = 6


def compute_dtype(dtype: DTypeLike) -> DTypeLike:
    """In which weights of this dtype are quantized and blended, and their scales stored."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def limits(dtype: DTypeLike) -> tuple[float, float]:
    """The smallest and the largest value that a scale, and weights of this dtype, can have."""
    smallest = jnp.finfo(dtype).smallest_subnormal, jnp.finfo(compute_dtype(dtype)).tiny
    return max(map(float, smallest)), float(jnp.finfo(dtype).max)


def normalize(w: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`w` divided by the largest magnitude of its block, and that magnitude.

    Blocks that are too small to have a scale become zeros with magnitude 0. NaN stays NaN.
    """
    magnitude = jnp.max(jnp.abs(w), axes, keepdims=True)
    magnitude = jnp.where(magnitude < _HEADROOM * float(jnp.finfo(w.dtype).tiny), 0, magnitude)
    # XLA multiplies by the reciprocal, which is flushed to zero if the divisor is above 2**126.
    shrink = jnp.where(magnitude > 1, 0.25, 1).astype(w.dtype)
    divisor = or_one(magnitude) * shrink
    return jnp.where(magnitude == 0, 0, w * shrink / divisor), magnitude


def restore(scale: Array, magnitude: Array) -> Array:
    """The scale of blocks whose normalized scale is `scale`; 1 for blocks of zeros."""
    return jnp.where(magnitude == 0, 1, scale * magnitude)


def below(largest: float, magnitude: Array, reach: float | Array) -> Array:
    """The largest normalized scale at which no level overflows.

    Args:
      largest: the largest number of the weights' dtype.
      magnitude: as `normalize` gives it.
      reach: the magnitude of the outermost level in units of the scale.
    """
    shrink = jnp.where(magnitude > 1, 0.25, 1).astype(magnitude.dtype)  # as in `normalize`
    room = largest * shrink / (or_one(magnitude) * shrink)
    return room * (1 - 2**-20) / reach  # products round


def or_one(x: Array) -> Array:
    """`x` with zeros replaced by ones: for divisors."""
    return jnp.where(x == 0, 1, x)


def nearest_level(w: Array, scale: Array, levels: Levels) -> Array:
    """The level nearest to each weight: an integer, as a float."""
    return jnp.clip(jnp.round(w / scale), *levels)


def least_squares(w: Array, absmax: Array, levels: Levels, axes: tuple[int, ...]) -> Array:
    """The scale of least squared error for evenly spaced levels, found in a few passes over `w`.

    The error falls as the scale shrinks from `absmax`, which clips nothing, and rises again once
    clipping costs more than finer levels gain. In between it has many local minima, more of them
    the more levels there are. So it is measured at several starts, from `absmax` down to just below
    the best scale for evenly spread weights, whose tails are the lightest. A parabola through the
    best of them and its neighbours gives one scale more. The best of all begins a round of
    alternation: the nearest levels q, then the best scale for these, <w, q> / <q, q>. As this never
    raises the error, it ends no higher than that of `absmax`.
    """
    lowest, highest = levels
    variance = jnp.mean(w * w, axes, keepdims=True) - jnp.mean(w, axes, keepdims=True) ** 2
    # Evenly spread weights cover sqrt(12) = 3.46 standard deviations, n levels n times the scale.
    smallest = or_one(3.3 * jnp.sqrt(jnp.maximum(variance, 0))) / (highest - lowest + 1)
    step = jnp.log(jnp.minimum(smallest / absmax, 0.9)) / (_STARTS - 1)

    def start(i: Array) -> Array:
        return absmax * jnp.exp(step * i)

    # A loop, not one array of all starts: it keeps the memory and the compiled program small.
    errors = jax.lax.map(
        lambda i: _squared_error(w, start(i), levels, axes), jnp.arange(_STARTS, dtype=w.dtype)
    )
    best = jnp.argmin(errors, axis=0)
    middle = jnp.clip(best, 1, _STARTS - 2)
    left, center, right = (
        jnp.take_along_axis(errors, (middle + i)[None], axis=0)[0] for i in (-1, 0, 1)
    )
    curvature = left - 2 * center + right
    offset = jnp.where(curvature > 0, (left - right) / (2 * or_one(curvature)), 0)
    between = start(middle.astype(w.dtype) + jnp.clip(offset, -1, 1))

    better = _squared_error(w, between, levels, axes) < jnp.min(errors, axis=0)
    scale = jnp.where(better, between, start(best.astype(w.dtype)))
    q = nearest_level(w, scale, levels)
    wq, qq = jnp.sum(w * q, axes, keepdims=True), jnp.sum(q * q, axes, keepdims=True)
    return or_one(wq / or_one(qq))


def _squared_error(w: Array, scale: Array, levels: Levels, axes: tuple[int, ...]) -> Array:
    """The squared error of each block at this scale."""
    lowest, highest = levels
    x = w / scale
    # One clip of the rounded x would do, but XLA makes two passes of that on CPUs and one of this.
    inside = (x >= lowest) & (x <= highest)
    error = jnp.where(inside, x - jnp.round(x), x - jnp.clip(x, lowest, highest))
    return scale**2 * jnp.sum(error * error, axes, keepdims=True)


def least_squares_ternary(w: Array, axes: tuple[int, ...]) -> Array:
    """The scale of least squared error for codes -1, 0 and +1, exactly.

    If the k largest magnitudes of a block get a code, their mean is the best scale, and the error
    falls by (their sum)**2 / k: sorting gives this for every k. At the optimum a weight has a code
    exactly if its magnitude is above half the scale.
    """
    sums = jnp.cumsum(jnp.flip(_sorted_magnitudes(w, axes), axis=-1), axis=-1)
    k = jax.lax.broadcasted_iota(w.dtype, sums.shape, sums.ndim - 1) + 1
    best = jnp.argmax(sums**2 / k, axis=-1, keepdims=True)
    scale = jnp.take_along_axis(sums, best, axis=-1) / (best + 1).astype(w.dtype)
    return scale.reshape(_shape_of_blocks(w, axes))


def least_squares_two_signs(w: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The scales `v1 >= v2 >= 0` of least squared error for the levels +-v1 +-v2, exactly.

    Magnitudes fall into a lower group, quantized to v1 - v2, and an upper one, to v1 + v2. The
    means of the groups are the best two values, and if the k smallest are the lower group, the
    error falls by k (n - k) / n (the difference of the means)**2: sorting gives this for every k.
    """
    ascending = _sorted_magnitudes(w, axes)
    n = ascending.shape[-1]
    if n == 1:
        only = ascending.reshape(_shape_of_blocks(w, axes))
        return only, jnp.zeros_like(only)
    k = jax.lax.broadcasted_iota(w.dtype, ascending[..., 1:].shape, ascending.ndim - 1) + 1
    # Summed from both sides, since the difference to the whole sum would lose digits.
    lower = jnp.cumsum(ascending, axis=-1)[..., :-1] / k
    upper = jax.lax.cumsum(ascending, axis=ascending.ndim - 1, reverse=True)[..., 1:] / (n - k)
    best = jnp.argmax(k * (n - k) * (upper - lower) ** 2, axis=-1, keepdims=True)
    low, high = (
        jnp.take_along_axis(means, best, axis=-1).reshape(_shape_of_blocks(w, axes))
        for means in (lower, upper)
    )
    return (high + low) / 2, (high - low) / 2


def mean_magnitude(w: Array, axes: tuple[int, ...]) -> Array:
    """The mean of |w|: the scale of least squared error for codes -1 and +1, of any `w`.

    0 where it is no normal number, as it would be on devices that flush others.
    """
    # Each term is divided by the count, so that a sum of numbers near 1e38 does not overflow.
    count = math.prod(w.shape[i] for i in axes)
    mean = jnp.sum(jnp.abs(w) / count, axes, keepdims=True)
    return jnp.where(mean < float(jnp.finfo(w.dtype).tiny), 0, mean)


def signs(w: Array) -> Array:
    """-1 or +1 in the dtype of `w`; zero counts as +1."""
    return jnp.where(w >= 0, 1, -1).astype(w.dtype)


def _sorted_magnitudes(w: Array, axes: tuple[int, ...]) -> Array:
    """|w| with a row for each block, rising along the last axis."""
    rows = jnp.moveaxis(jnp.abs(w), axes, range(-len(axes), 0))
    rows = rows.reshape(*rows.shape[: -len(axes)], -1)
    # Floats that are not negative are ordered as their bits are, and XLA's sort of integers is six
    # times faster on CPUs.
    bits = jax.lax.bitcast_convert_type(rows, f"int{8 * w.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jnp.sort(bits, axis=-1), w.dtype)


def _shape_of_blocks(w: Array, axes: tuple[int, ...]) -> list[int]:
    return [1 if i in axes else size for i, size in enumerate(w.shape)]
