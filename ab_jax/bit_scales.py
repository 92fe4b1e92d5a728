"""One scale a bit: the levels `+-v_1 +-v_2 ...` of least squared error, by alternation.

The nearest level of each weight gives its signs; for these the best scales follow from how many
weights there are at each level, and from their sums (least-squares binary quantization, arXiv
2001.02786). The two in turn never raise the error, but they end in the minimum nearest to where
they begin. So they begin many times, on a table of how many magnitudes lie above each of a row of
thresholds, which one pass over the weights gives. The best end then goes on with the weights.

A level and its negative are one magnitude, named by its signs with v_1's taken as positive. Arrays
here have these 2**(bits - 1) magnitudes, or the bits, in front; then the starts; then the axes of
the blocks. Lengths are in units of a block (`thresholds.UNITS`).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.scale_fits import signs
from ab_jax.thresholds import UNITS, above, mean_excess

# Thresholds of the table.
_EDGES = 64
# Where to begin, in mean magnitudes: the best scales there are for normal weights, for Laplace's,
# even ones, a gamma distribution of shape 1/2, and two heaps, narrow and wide; twice, where minima
# of much the same depth lie apart. Each in several sizes; one more begins with even levels up to
# the largest magnitude.
_STARTS = {
    3: (
        *((1.24, 0.94, 0.57), (1.9, 1.44, 0.83), (1.0, 0.5, 0.25), (3.0, 2.2, 1.1)),
        *((1.0, 0.1, 0.05), (1.0, 0.3, 0.16)),
    ),
    4: (
        *((1.2, 1.03, 0.84, 0.53), (1.29, 1.13, 0.62, 0.31), (1.89, 1.63, 1.33, 0.86)),
        *((2.14, 1.88, 0.99, 0.52), (1.0, 0.5, 0.25, 0.125), (3.07, 2.5, 2.0, 1.6)),
        *((3.6, 3.1, 1.4, 1.0), (1.0, 0.1, 0.075, 0.045), (1.0, 0.3, 0.22, 0.135)),
    ),
}
_SIZES = (0.9, 1.1)
# Of which so many are followed up.
_KEPT = 3
# Rounds of alternation on the table, and on the weights.
_ON_TABLE, _ON_WEIGHTS = 12, 4

# From edges [magnitudes, starts, *blocks] to the fraction of weights whose magnitude is above each,
# and the sum of these over the number of all.
Above = Callable[[Array], tuple[Array, Array]]


class BitLevels(NamedTuple):
    """The scales of the bits, and what the codes at them follow from.

    Attributes:
      scales: [bits, ...], falling.
      edges: [2**(bits - 1), ...], from where on each of the rising magnitudes is the nearest.
      steps: from the code of a magnitude to that of the next, the first from 0.
    """

    scales: Array
    edges: Array
    steps: Array


def least_squares(w: Array, magnitude: Array, bits: int, axes: tuple[int, ...]) -> Array:
    """Scales of least squared error, or near it.

    For normal weights the error is within 1.05 of the least at 3 bits; at 4 bits it is 1.02 to 1.06
    times the least on the average over blocks, and up to 1.2 in a block of 64.

    Args:
      w: floats.
      magnitude: the largest of each block (`scale_fits.magnitude`).
      bits: 3 or 4.
      axes: those of `w` that run inside a block; results keep them with size 1.

    Returns:
      The scales [bits, ...] over the largest magnitude, falling.
    """
    w, magnitude = jax.lax.stop_gradient((w, magnitude))
    of_table, mean = _table(w, magnitude, axes)
    scales = _best(_starts(bits, mean), of_table, _KEPT)
    scales = jax.lax.fori_loop(0, _ON_TABLE, lambda _, v: _improved(v, of_table), scales)
    scales = _best(scales, of_table, 1)
    inside = tuple(axis + 1 for axis in axes)

    def of_weights(edge: Array) -> tuple[Array, Array]:
        fraction, total = above(w[None], magnitude[None], edge[:, 0], inside)
        return fraction[:, None], total[:, None]

    scales = jax.lax.fori_loop(0, _ON_WEIGHTS, lambda _, v: _improved(v, of_weights), scales)
    scales = -jnp.sort(-jnp.abs(scales), axis=0)
    return scales[:, 0] / UNITS


def levels_at(scales: Array) -> BitLevels:
    """The levels of these scales [bits, ...]."""
    bits = scales.shape[0]
    if bits == 2:  # v_1 - v_2 and v_1 + v_2 have v_1 between them
        first, one = scales[:1], jnp.ones_like(scales[:1])
        return BitLevels(scales, jnp.concatenate([-one, first]), jnp.concatenate([one, 2 * one]))
    magnitudes, of_level = _levels(scales[:, None])
    codes = sum(sign * 2 ** (bits - 1 - i) for i, sign in enumerate(of_level))
    steps = codes - jnp.concatenate([0 * codes[:1], codes[:-1]])
    return BitLevels(scales, _edges(magnitudes)[:, 0], steps[:, 0])


def codes(w: Array, levels: BitLevels) -> Array:
    """Codes as `BinaryCoded` has them, as floats of the shape of `w`."""
    beyond = (jnp.abs(w)[None] > levels.edges).astype(w.dtype)
    return signs(w) * jnp.sum(beyond * levels.steps, axis=0)


def _table(w: Array, magnitude: Array, axes: tuple[int, ...]) -> tuple[Above, Array]:
    """What lies above an edge, read off a table; and the mean magnitude."""
    step = UNITS / (_EDGES - 1)
    t = (step * np.arange(_EDGES)).astype(w.dtype).reshape(-1, *(1,) * w.ndim)
    inside = tuple(axis + 1 for axis in axes)
    edges = jnp.asarray(t) + jnp.minimum(magnitude, 0)[None]
    excess = mean_excess(w[None], magnitude[None], edges, inside)
    # In the middles of the intervals, and before the first one everything.
    fractions = (excess[:-1] - excess[1:]) / step
    sums = (excess[:-1] + excess[1:]) / 2 + fractions * (t[:-1] + step / 2)
    fractions = jnp.concatenate([jnp.ones_like(excess[:1]), fractions, 0 * excess[:1]])
    sums = jnp.concatenate([excess[:1], sums, 0 * excess[:1]])

    def look_up(edge: Array) -> tuple[Array, Array]:
        flat = edge.reshape(-1, *edge.shape[2:])
        position = jnp.minimum(jnp.maximum(flat / step + 0.5, 0), _EDGES - 0.5)
        index = jnp.floor(position)
        share, at = position - index, index.astype(int)
        found = (
            jnp.take_along_axis(x, at, axis=0) * (1 - share)
            + jnp.take_along_axis(x, at + 1, axis=0) * share
            for x in (fractions, sums)
        )
        first, second = (x.reshape(edge.shape) for x in found)
        return first, second

    return look_up, excess[0]


def _starts(bits: int, mean: Array) -> Array:
    """[bits, starts, *blocks]"""
    sizes = [np.multiply(row, size) for row in _STARTS[bits] for size in _SIZES]
    rows = np.asarray(sizes, mean.dtype)
    of_mean = rows.T.reshape(bits, len(rows), *(1,) * mean.ndim) * mean[None, None]
    halves = 0.5 ** np.arange(1, bits + 1)
    even = (UNITS * halves / halves.sum()).astype(mean.dtype)
    even = even.reshape(bits, 1, *(1,) * mean.ndim)
    return jnp.concatenate([of_mean, even + jnp.zeros_like(mean)[None, None]], axis=1)


def _levels(scales: Array) -> tuple[Array, Array]:
    """The magnitudes of the levels, rising, [magnitudes, starts, *blocks]; and the signs of each.

    The signs [bits, magnitudes, ...] are those whose sum is positive, v_1's too.
    """
    bits = scales.shape[0]
    count = 2 ** (bits - 1)
    numbers = np.arange(count, dtype=np.int32).reshape(-1, *(1,) * (scales.ndim - 1))
    levels = jnp.abs(_signed(scales, _signs_of(numbers, bits)))
    # Sorted with their numbers in the last bits, which are sorted along.
    kept = np.int32(-count)
    keys = jax.lax.bitcast_convert_type(levels.astype(jnp.float32), jnp.int32)
    number = jnp.sort((keys & kept) | numbers, axis=0) & ~kept
    of_number = _signs_of(number, bits)
    levels = _signed(scales, of_number)
    # Where scales cancel, programs that compute the level twice may round it to either side of 0.
    side = signs(levels + 2.0**-20 * jnp.sum(jnp.abs(scales), axis=0, keepdims=True))
    return jnp.abs(levels), jnp.stack([sign * side for sign in of_number])


def _signs_of(number: Any, bits: int) -> list[Any]:
    """The signs of magnitudes by their number: +1 of v_1, then a binary digit each."""
    digits = [(number >> (bits - 1 - i)) & 1 for i in range(1, bits)]
    return [0 * number + 1, *(1 - 2 * digit for digit in digits)]


def _signed(scales: Array, of_number: list[Any]) -> Array:
    return sum(
        scale[None] * sign.astype(scale.dtype)
        for scale, sign in zip(scales, of_number, strict=True)
    )


def _edges(magnitudes: Array) -> Array:
    """From where on each of the rising magnitudes is the nearest; the lowest from -1 on."""
    between = magnitudes[1:] / 2 + magnitudes[:-1] / 2
    return jnp.concatenate([jnp.full_like(magnitudes[:1], -1), between])


def _groups(magnitudes: Array, of: Above) -> tuple[Array, Array]:
    """The fraction of weights that are nearest to each level, and the sum of their magnitudes."""
    counts, sums = (x - jnp.concatenate([x[1:], 0 * x[:1]]) for x in of(_edges(magnitudes)))
    return counts, sums


def _improved(scales: Array, of: Above) -> Array:
    """The scales after one round of alternation: of no larger error."""
    magnitudes, of_level = _levels(scales)
    counts, sums = _groups(magnitudes, of)
    bits = range(scales.shape[0])
    target = [jnp.sum(of_level[i] * sums, axis=0) for i in bits]
    overlap = {
        (i, j): jnp.sum(of_level[i] * of_level[j] * counts, axis=0)
        for i, j in itertools.combinations(bits, 2)
    }
    v = list(scales)
    for _ in range(4):  # one scale at a time, given the others, as two may be of no account
        for i in bits:
            others = (overlap[min(i, j), max(i, j)] * v[j] for j in bits if j != i)
            v[i] = target[i] - sum(others)
    return jnp.stack(v)


def _best(scales: Array, of: Above, count: int) -> Array:
    """The starts of least error, so many: [bits, count, *blocks]."""
    magnitudes, _ = _levels(scales)
    counts, sums = _groups(magnitudes, of)
    lost = jnp.sum((counts * magnitudes - 2 * sums) * magnitudes, axis=0)  # less a constant
    found = []
    for _ in range(count):
        is_best = lost == jnp.min(lost, axis=0, keepdims=True)
        found.append(jnp.min(jnp.where(is_best[None], scales, jnp.inf), axis=1))
        lost = jnp.where(is_best, jnp.inf, lost)
    return jnp.stack(found, axis=1)
