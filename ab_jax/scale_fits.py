"""What all fits of scales share: magnitudes of blocks, their limits, levels and signs.

The fits themselves are `even_levels` (`Uniform`), `thresholds` (`Ternary`, two signs) and
`bit_scales` (`LeastSquaresBinary` of 3 and 4 bits); that of `Binary` is the mean magnitude, here.

A block is the weights that share one scale. In all functions `w` is an array of floats whose `axes`
run inside a block; results have one entry a block and keep those axes with size 1. NaN or infinity
in a block makes its scale NaN.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# Below so many times the smallest normal number a scale (magnitude / 127) may be no normal number.
# CPUs and accelerators flush others to zero, and a division by it would no longer be finite.
_HEADROOM = 2.0**8


def compute_dtype(dtype: DTypeLike) -> DTypeLike:
    """In which weights of this dtype are quantized and blended, and their scales stored."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def limits(dtype: DTypeLike) -> tuple[float, float]:
    """The smallest and the largest value that a scale, and weights of this dtype, can have."""
    smallest = jnp.finfo(dtype).smallest_subnormal, jnp.finfo(compute_dtype(dtype)).tiny
    return max(map(float, smallest)), float(jnp.finfo(dtype).max)


def block_axes(
    shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape in which blocks are made of whole axes, and which axes run inside a block.

    A grouped axis is split into (groups, weights of one). Axes of size 1 go, with which XLA reduces
    ten times slower on CPUs.

    Args:
      shape: of a weight.
      scale_shape: of its scale: each size divides that of the weight.
    """
    split: list[int] = []
    shared: list[int] = []
    for size, count in zip(shape, scale_shape, strict=True):
        if count > 1:
            split.append(count)
        if count != size:  # not <, which sizes of exported programs ("batch") cannot tell
            shared.append(len(split))
            split.append(size // count)
    if not shared:  # every weight is a block of its own
        shared.append(len(split))
        split.append(1)
    return tuple(split), tuple(shared)


def group_counts(sizes: Sequence[int], group_size: int) -> list[int] | None:
    """How many groups each of these axes has if they are split as one, in C order.

    Groups are blocks of whole axes but for one: parts of the last axis, or so many whole ones.

    >>> group_counts([8, 64], 16), group_counts([8, 64], 128), group_counts([8, 64], 96)
    ([8, 4], [4, 1], None)

    Args:
      sizes: of the axes.
      group_size: how many neighbours share a scale.

    Returns:
      A number that divides the size, for each axis; None: there are no such groups.
    """
    counts: list[int] = []
    for size in reversed(sizes):
        if size % group_size == 0:
            counts.append(size // group_size)
            group_size = 1
        elif group_size % size == 0:
            counts.append(1)
            group_size //= size
        else:
            return None
    return counts[::-1] if group_size == 1 else None


def magnitude(w: Array, axes: tuple[int, ...]) -> Array:
    """The largest magnitude of each block; 0 where that is too small for it to have a scale.

    NaN where a weight is NaN or infinite: no scale serves such a block.
    """
    largest = jnp.max(jnp.abs(w), axes, keepdims=True)
    largest = jnp.where(largest == jnp.inf, jnp.nan, largest)
    return jnp.where(largest < _HEADROOM * float(jnp.finfo(w.dtype).tiny), 0, largest)


def shrink(magnitude: Array) -> Array:
    """A factor that brings blocks of this magnitude to where their reciprocals are normal."""
    return jnp.where(magnitude > 1, jnp.full_like(magnitude, 0.25), 1)


def below(largest: float, magnitude: Array, reach: float | Array) -> Array:
    """The largest scale, in units of the magnitude, at which no level overflows.

    Args:
      largest: the largest number of the weights' dtype.
      magnitude: the largest of each block.
      reach: the magnitude of the outermost level in units of the scale.
    """
    factor = shrink(magnitude)
    room = largest * factor / (or_one(magnitude) * factor)
    return room * (1 - 2**-20) / reach  # products round


def or_one(x: Array) -> Array:
    """`x` with zeros replaced by ones: for divisors."""
    return jnp.where(x == 0, 1, x)


def nearest_level(x: Array, lowest: Array | float, highest: Array | float) -> Array:
    """The level nearest to `x`, in units of the scale: an integer, as a float."""
    q = jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.minimum(jnp.maximum(q, lowest), highest)


def in_units(w: Array, scale: Array) -> Array:
    """`w / scale`, for scales up to the largest of floats.

    Compilers multiply by the inverse, and that of a scale above 1e38 is no normal number.
    """
    factor = shrink(scale)
    return (w * factor) / (scale * factor)


def mean_magnitude(w: Array, axes: tuple[int, ...]) -> Array:
    """The mean of |w|: the scale of least squared error for codes -1 and +1, of any `w`.

    0 where half of it is no normal number, as it would be on devices that flush others; infinite
    only where a weight is.
    """
    # Each term is divided by the count, so that a sum of numbers near 1e38 does not overflow; and
    # by two, as the mean of the largest floats may round to more, which is infinity.
    count = math.prod(w.shape[i] for i in axes)
    half = jnp.sum(jnp.abs(w) / (2 * count), axes, keepdims=True)
    limits = jnp.finfo(w.dtype)
    mean = jnp.where(half < math.inf, jnp.minimum(2 * half, float(limits.max)), half)
    return jnp.where(half < float(limits.tiny), 0, mean)


def scale_of_signs(w: Array, axes: tuple[int, ...]) -> Array:
    """The scale for codes -1 and +1: the mean of |w|, NaN where it is infinite."""
    mean = mean_magnitude(w, axes)
    return jnp.where(mean == jnp.inf, jnp.nan, mean)


def signs(w: Array) -> Array:
    """-1 or +1 in the dtype of `w`; zero counts as +1."""
    return jnp.where(w >= 0, 1, -1).astype(w.dtype)
