"""Evenly spaced levels: the scale, and the zero point, of least squared error.

The squared error of a block at scale s is sum (w - s * q)**2 over its weights, where q is the
integer nearest to w / s, cut off at the outermost levels. It falls as s shrinks from absmax, which
cuts off nothing, since levels get finer; it rises once cutting off costs more; and on top of this
it goes up and down as single weights come to lie on levels or between two: hundreds of local minima
at 8 bits, deep ones in a block of few weights. So it is measured on a grid of scales, fine enough
for those minima and wide enough for any distribution. From the best of them alternation (the
nearest levels q, then the best scale for these, <w, q> / <q, q>) leads to the minimum itself. The
work is fixed by the size of a block and the number of levels.

All of a grid is measured in one pass over the weights: they are read once, nothing of their size is
held, and where a block lies on several devices, these add up sums.

Scales are told by `finer`: how many times the levels are closer than those of absmax. Candidates
have axes of their own before those of the blocks.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.scale_fits import nearest_level, or_one, shrink

# Blocks of fewer weights have narrow minima, of which the best in so many parts of the grid are
# followed up; in others it is the best of all.
_FEW, _FOLLOWED = 256, 16
# Scales and shares tried around the best of the grid, where it has only some windows at each scale:
# in each round so many of each, so far to both sides of the logarithm and of the share. Were two
# rounds of one size, XLA on CPUs would share what both begin with, and write it out.
_AROUND = ((7, 0.2, 0.22), (5, 0.05, 0.06))
# By how many standard deviations the least error may lie below the usual one, by good luck.
_LUCK = 5.5
# So many candidates along one axis at most: with more, XLA on CPUs sums on one core.
_ABREAST = 64

_TO_EVEN = jax.lax.RoundingMethod.TO_NEAREST_EVEN


class EvenLevels(NamedTuple):
    """Multiples of a scale from the lowest to the highest, one entry a block.

    Attributes:
      inverse: of the scale of the shrunk weights; positive, also where a block holds zeros alone.
      lowest, highest: in units of the scale: integers, 0 among them or between them.
    """

    inverse: Array
    lowest: Array | float
    highest: Array | float


class _Grid(NamedTuple):
    """Which levels are tried: at scales of one ratio, each with some windows of levels.

    Attributes:
      first: the power of the ratio that is the largest scale; power 0 is that of absmax.
      step: the logarithm of the ratio.
      windows: how many; they cut off more and more below and less above. Of few levels all.
      shape: of the candidates, along two axes (see `_ABREAST`).
      followed: of so many parts of them the best is followed up.
    """

    first: int
    step: float
    windows: int
    shape: tuple[int, int]
    followed: int

    def at(self, number: Any, dtype: Any) -> tuple[Any, Any]:
        """Of candidates by number: how fine they are, and the share that is cut off below."""
        power = (number // self.windows + self.first).astype(dtype)
        share = (number % self.windows).astype(dtype) / max(self.windows - 1, 1)
        return (np if isinstance(number, np.ndarray) else jnp).exp(self.step * power), share


def absmax(
    w: Array, magnitude: Array, bits: int, symmetric: bool, axes: tuple[int, ...]
) -> EvenLevels:
    """The levels that span all weights of a block, and 0.

    Args:
      w: floats.
      magnitude: the largest of each block (`scale_fits.magnitude`).
      bits: of a code.
      symmetric: the same levels on both sides of 0; else 2**bits of them.
      axes: those of `w` that run inside a block; results keep them with size 1.
    """
    steps = _steps(bits, symmetric)
    inverse, low = _widest(w, magnitude, steps, symmetric, axes)
    lowest = low if isinstance(low, float) else _lowest(low, steps)
    return EvenLevels(inverse, lowest, lowest + steps)


def least_squares(
    w: Array,
    magnitude: Array,
    bits: int,
    symmetric: bool,
    axes: tuple[int, ...],
    *,
    largest: float,
) -> EvenLevels:
    """The levels of least squared error: scale and, unless symmetric, zero point together.

    The error is never above that of `absmax`; of blocks of 9 weights and more it is at most 1.05
    times the least there is at 2 to 4 bits, and 1.01 times at 5 to 8, or below a millionth of the
    squares.

    Args:
      w, magnitude, bits, symmetric, axes: as for `absmax`.
      largest: the largest number that a level may be. Levels of `absmax` may be above it.
    """
    steps = _steps(bits, symmetric)
    grid = _grid(math.prod(w.shape[i] for i in axes), bits, symmetric)
    # Two axes in front, for candidates.
    w, magnitude = jax.lax.stop_gradient((w[None, None], magnitude[None, None]))
    axes = tuple(axis + 2 for axis in axes)
    of_shrunk, low = _widest(w, magnitude, steps, symmetric, axes)
    # Weights above 1e37, for which this is no normal number and may be 0, get absmax.
    inverse = of_shrunk * shrink(magnitude)
    # Of the data, since XLA on CPUs would write out a constant that kernels of one shape share.
    top = jnp.where(of_shrunk > 0, steps / 2, 0)

    def lowest(finer: Any, share: Any) -> Array | float:
        """The lowest level, if this share of what the levels do not span is cut off below.

        Of few levels, if this share of them lies below 0.
        """
        if isinstance(low, float):
            return low
        if grid.windows == steps + 1:
            return _lowest(0 * low - share * steps, steps)
        return _lowest(finer * low + share * jnp.maximum(finer * steps - steps, 0), steps)

    def error(finer: Any, lowest: Array | float) -> Array:
        """In units of the squared scale of absmax."""
        center = None if symmetric else lowest + top
        return _squared_error(w, finer * inverse, center, top, axes) / (finer * finer)

    def column(numbers: Any) -> Any:
        """Along the axes of candidates."""
        return numbers.reshape(*numbers.shape, *(1,) * (w.ndim - 2))

    number = np.arange(math.prod(grid.shape))
    finer, share = map(column, grid.at(number.reshape(grid.shape), w.dtype))
    errors = error(finer, lowest(finer, share))
    of_part = errors.reshape(grid.followed, -1, *errors.shape[2:])
    best = jnp.argmin(of_part, axis=1, keepdims=True)
    starts = column(number.reshape(grid.followed, -1)[:, :1]).astype(best.dtype)
    finer, share = grid.at(starts + best, w.dtype)
    for around in _AROUND if 1 < grid.windows <= steps else ():
        scales, shares = (column(x[None]).astype(w.dtype) for x in _around(*around))
        errors = error(finer * scales, lowest(finer * scales, share + shares))
        best = jnp.argmin(errors, axis=1, keepdims=True)
        scales, shares = (
            jnp.sum(jnp.where(column(np.arange(x.size)[None]) == best, x, 0), 1, keepdims=True)
            for x in (scales, shares)
        )
        finer, share = finer * scales, share + shares
    window = lowest(finer, share)
    finer = _alternated(w, finer, inverse, window, top, axes)
    if grid.followed > 1:  # only at the minima it shows which is the deepest
        finer, window = _best(error(finer, window), finer, window)
    usable = inverse > 0
    if not isinstance(window, float):  # a window off the middle reaches far beyond the weights
        reach = jnp.maximum(window + steps, -window)
        usable &= reach <= finer * of_shrunk * (shrink(magnitude) * largest)
        window = jnp.where(usable, window, _lowest(jnp.asarray(low), steps))[0, 0]
    inverse = (jnp.where(usable, finer, 1) * of_shrunk)[0, 0]
    return EvenLevels(inverse, window, window + steps)


def _steps(bits: int, symmetric: bool) -> int:
    """From the lowest level to the highest, in units of the scale."""
    return 2**bits - (2 if symmetric else 1)


def _widest(
    w: Array, magnitude: Array, steps: int, symmetric: bool, axes: tuple[int, ...]
) -> tuple[Array, Array | float]:
    """The inverse of the scale of absmax, shrunk, and over that scale the lowest weight, or 0."""
    if symmetric:
        return steps / 2 / or_one(magnitude * shrink(magnitude)), -steps / 2
    low = jnp.minimum(jnp.min(w, axes, keepdims=True), 0) * shrink(magnitude)
    high = jnp.maximum(jnp.max(w, axes, keepdims=True), 0) * shrink(magnitude)
    inverse = steps / or_one(jnp.where(magnitude == 0, 0, high - low))
    return inverse, low * inverse


def _lowest(wanted: Array, steps: int) -> Array:
    """The lowest level, an integer: the nearest to what is wanted with which 0 is a level."""
    return nearest_level(wanted, -steps, 0)


def _grid(count: int, bits: int, symmetric: bool) -> _Grid:
    """How to search blocks of so many weights."""
    steps = _steps(bits, symmetric)
    # No larger scale is better, as errors grow with its square, but for luck, which blocks of many
    # weights have least of.
    first = 0.5 * math.log(min(max(1 - _LUCK / math.sqrt(count), 0.25), 0.96))
    # No smaller one is better that cuts off as much of the outermost weight alone as all lose at
    # that of absmax, where they lie anyhow between two levels.
    usual = count / 12 + 3 * math.sqrt(count / 180)
    cut_off = math.sqrt(usual) * (2 if symmetric else math.sqrt(2)) / steps
    # Nor one below this, r, by more than the share forgone: it cuts off the largest weight, which
    # costs (1 - r)**2 of its square, and this one adds at most count * scale**2 / 4.
    ratio = steps * math.sqrt((0.02 if bits <= 4 else 0.004) / count)
    last = -math.log(max(1 - cut_off, ratio / (1 + ratio)))
    few = count < _FEW
    # By how many levels the largest weight moves on from one scale to the next; found by trial.
    phase = (0.035 if count < 16 else 0.05) if few else 0.2 if bits <= 4 else 0.1
    step = phase / (steps / 2)
    powers = range(math.floor(first / step), math.ceil(last / step) + 1)
    windows = 1 if symmetric else 2**bits if bits <= 3 else 5
    followed = _FOLLOWED if few else 1
    stretches = followed * math.ceil(len(powers) * windows / _ABREAST / followed)
    scales = math.ceil(len(powers) / stretches)
    return _Grid(powers[0], step, windows, (stretches, scales * windows), followed)


def _around(count: int, of_scale: float, of_share: float) -> tuple[np.ndarray, np.ndarray]:
    """By how much scales and shares are changed to find better ones nearby."""
    offsets = np.linspace(-1, 1, count)
    scales, shares = np.meshgrid(np.exp(of_scale * offsets), of_share * offsets)
    return scales.ravel(), shares.ravel()


def _squared_error(
    w: Array, inverse: Array, center: Array | None, top: Array, axes: tuple[int, ...]
) -> Array:
    """The squared error of each block at each of some scales, in units of the squared scale.

    Args:
      w: [1, 1, *weights].
      inverse: of the scale, [stretches, scales, *blocks].
      center: the middle of the levels in units of the scale, of that shape; None: it is 0, a level.
      top: the distance of the outermost levels from it, [1, 1, *blocks].

    Returns:
      [stretches, scales, *blocks].
    """
    # Magnitudes of distances are what XLA on CPUs computes within the sum. Cutting off on both
    # sides makes it write out arrays as large as all candidates together.
    distance = w * inverse
    distance = jnp.abs(distance if center is None else distance - center)
    if center is None:
        level = jax.lax.round(distance, _TO_EVEN)
    else:  # which lies between two levels
        half = jnp.where(top > 0, 0.5, 0)
        level = jax.lax.round(distance - half, _TO_EVEN) + half
    error = distance - jnp.minimum(level, top)
    return jnp.sum(error * error, axes, keepdims=True)


def _alternated(
    w: Array,
    finer: Array,
    inverse: Array,
    lowest: Array | float,
    top: Array,
    axes: tuple[int, ...],
) -> Array:
    """As `finer` the best scale for the levels that are nearest now: no worse than now."""
    if isinstance(lowest, float):
        # <q, q> and <x, q> out of (q - a x)**2, summed for three a in one pass over the weights.
        # Zeros give x the shape of the three, or XLA on CPUs would write it out.
        a = np.asarray([0, 1, -1], w.dtype).reshape(-1, *(1,) * w.ndim) * (top / -lowest)[None]
        x = jnp.abs(w[None] * ((finer * inverse)[None] + jnp.minimum(a, 0) * 0))
        part = jnp.minimum(jax.lax.round(x, _TO_EVEN), top[None]) - x * a
        qq, less, more = jnp.sum(part * part, tuple(axis + 1 for axis in axes), keepdims=True)
        xq = (more - less) / 4
    else:
        x = w * (finer * inverse)
        q = nearest_level(x, lowest, lowest + 2 * top)
        xq, qq = (jnp.sum(product, axes, keepdims=True) for product in (x * q, q * q))
    ratio = qq / xq  # not finite where all codes are 0
    return jnp.where(ratio > 0, finer * jnp.minimum(ratio, 2), finer)


def _best(errors: Array, finer: Array, window: Array | float) -> tuple[Array, Array | float]:
    """Of the candidates along the first axis that of least error."""
    is_best = errors == jnp.min(errors, axis=0, keepdims=True)
    best = jnp.min(jnp.where(is_best, finer, jnp.inf), axis=0, keepdims=True)
    if not isinstance(window, float):  # of several that tie, one alone
        is_best &= finer == best
        window = jnp.max(jnp.where(is_best, window, -jnp.inf), axis=0, keepdims=True)
    return best, window
