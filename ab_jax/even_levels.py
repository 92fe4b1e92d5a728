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
# rounds of one size, XLA on CPUs would share what both begin with, and write it out. Where it has
# all windows: so many scales, so far in steps of the grid.
_AROUND = ((7, 7, 0.2, 0.22), (5, 5, 0.03, 0.06))
_BETWEEN = 7, 0.75
# By how many standard deviations the least error may lie below the usual one, by good luck. Scales
# that need more, as where only a few of the weights count, are not tried as closely.
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
    """Which levels are tried, from the largest scales to the smallest.

    The candidates lie along three axes: of each entry of the first, the best is followed up; the
    other two are apart only for `_ABREAST`.

    Attributes:
      finer: [followed, stretches, scales].
      share: of that shape; of what the levels do not span, how much is cut off below.
      windows: so many at each scale below that of absmax, with shares evenly from 0 to 1. Of few
        levels all.
      rounds: what is tried around the best: arguments of `_around`.
    """

    finer: np.ndarray
    share: np.ndarray
    windows: int
    rounds: tuple[tuple[int, int, float, float], ...]


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
    squares: for weights without a tail, and on a lattice. Where a few weights hold nearly all the
    squares, or most are zeros, a block of 256 and more may have more, as a few of a hundred blocks
    of Cauchy and Pareto weights do: up to 1.2 times; 1.7 times was the most that was found.

    Args:
      w, magnitude, bits, symmetric, axes: as for `absmax`.
      largest: the largest number that a level may be. Levels of `absmax` may be above it.
    """
    steps = _steps(bits, symmetric)
    grid = _grid(math.prod(w.shape[i] for i in axes), bits, symmetric)
    # Three axes in front, for candidates.
    w, magnitude = jax.lax.stop_gradient((w[None, None, None], magnitude[None, None, None]))
    axes = tuple(axis + 3 for axis in axes)
    of_shrunk, low = _widest(w, magnitude, steps, symmetric, axes)
    # Weights above 1e37, for which this, or a part of it, is no normal number and may be 0, get
    # absmax.
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

    def column(numbers: np.ndarray) -> np.ndarray:
        """Along the axes of candidates."""
        return numbers.reshape(*numbers.shape, *(1,) * (w.ndim - 3)).astype(w.dtype)

    scales, shares = column(grid.finer), column(grid.share)
    finer, share = _best(error(scales, lowest(scales, shares)), (1, 2), scales, shares)
    for around in grid.rounds:
        scales, shares = (column(x[None, None]) for x in _around(*around))
        errors = error(finer * scales, lowest(finer * scales, share + shares))
        change, shift = _best(errors, (2,), scales, shares)
        finer, share = finer * change, share + shift
    window = lowest(finer, share)
    finer = _alternated(w, finer, inverse, window, top, axes)
    if len(grid.finer) > 1:  # only at the minima it shows which is the deepest
        finer, window = _best(error(finer, window), (0,), finer, window)
    usable = inverse > 4 * float(jnp.finfo(w.dtype).tiny)
    if not isinstance(window, float):  # a window off the middle reaches far beyond the weights
        reach = jnp.maximum(window + steps, -window)
        usable &= reach <= finer * of_shrunk * (shrink(magnitude) * largest)
        window = jnp.where(usable, window, _lowest(jnp.asarray(low), steps))[0, 0, 0]
    inverse = (jnp.where(usable, finer, 1) * of_shrunk)[0, 0, 0]
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
    half, few = steps / 2, count < _FEW
    # By how many levels the largest weight moves on from one scale to the next; found by trial.
    phase = (0.035 if count < 16 else 0.05) if few else 0.2 if bits <= 4 else 0.1
    # No scale above twice that of absmax is better, as half of it has all the levels that are used.
    # One above absmax's is by good luck, of which blocks of many weights have least; or since
    # weights lie on a lattice, the scale of which puts the largest on a level.
    lucky = half * (1 - math.sqrt(min(max(1 - _LUCK / math.sqrt(count), 0.25), 0.96)))
    apart = phase if bits <= 4 else 1 if symmetric else 0.25
    dense = np.arange(phase, lucky, phase)
    inwards = np.append(dense, apart * np.arange(math.ceil(lucky / apart), half / 2 / apart))
    coarse = 1 - inwards[::-1] / half
    # No smaller one is better that cuts off as much of the outermost weight alone as all lose at
    # that of absmax, where they lie anyhow between two levels.
    usual = count / 12 + 3 * math.sqrt(count / 180)
    cut_off = math.sqrt(usual) * (2 if symmetric else math.sqrt(2)) / steps
    # Nor one below this, r, by more than the share forgone: it cuts off the largest weight, which
    # costs (1 - r)**2 of its square, and this one adds at most count * scale**2 / 4.
    ratio = steps * math.sqrt((0.02 if bits <= 4 else 0.004) / count)
    last = -math.log(max(1 - cut_off, ratio / (1 + ratio)))
    step = phase / half
    windows = 1 if symmetric else 2**bits if bits <= 3 else 5
    # Above the scale of absmax levels span all weights, wherever the window is.
    each = windows if windows > steps else 1
    number = coarse.size * each + math.ceil(last / step + 1) * windows
    followed = _FOLLOWED if few else 1
    stretches = math.ceil(number / _ABREAST / followed)
    shape = followed, stretches, math.ceil(number / followed / stretches)
    fine = np.exp(step * np.arange(math.prod(shape) // windows + 1))
    shares = np.linspace(0, 1, windows)
    finer = np.concatenate([np.repeat(coarse, each), np.repeat(fine, windows)])
    of_coarse = np.tile(shares if each > 1 else [0.5], coarse.size)
    share = np.concatenate([of_coarse, np.tile(shares, fine.size)])
    finer, share = (x[: math.prod(shape)].reshape(shape) for x in (finer, share))
    between = () if few else ((_BETWEEN[0], 1, _BETWEEN[1] * step, 0.0),)
    rounds = () if symmetric else between if windows > steps else _AROUND
    return _Grid(finer, share, windows, rounds)


def _around(
    scales: int, shares: int, of_scale: float, of_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """By how much scales and shares are changed to find better ones nearby."""
    log_scale = of_scale * np.linspace(-1, 1, scales)
    changes = np.meshgrid(np.exp(log_scale), of_share * np.linspace(-1, 1, shares))
    return changes[0].ravel(), changes[1].ravel()


def _squared_error(
    w: Array, inverse: Array, center: Array | None, top: Array, axes: tuple[int, ...]
) -> Array:
    """The squared error of each block at each of some scales, in units of the squared scale.

    Args:
      w: [1, 1, 1, *weights].
      inverse: of the scale, [followed, stretches, scales, *blocks].
      center: the middle of the levels in units of the scale, of that shape; None: it is 0, a level.
      top: the distance of the outermost levels from it, [1, 1, 1, *blocks].

    Returns:
      [followed, stretches, scales, *blocks].
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


def _best(
    errors: Array, axes: tuple[int, ...], finer: Any, window: Any
) -> tuple[Array, Array | float]:
    """Of the candidates along these axes that of least error."""
    # Not argmin, for which axes would be made one: weights whose sharding is part of their type
    # refuse that beside an axis that is sharded.
    is_best = errors == jnp.min(errors, axes, keepdims=True)
    best = jnp.min(jnp.where(is_best, finer, jnp.inf), axes, keepdims=True)
    if not isinstance(window, float):  # of several that tie, one alone
        is_best &= finer == best
        window = jnp.max(jnp.where(is_best, window, -jnp.inf), axes, keepdims=True)
    return best, window
