"""One scale a bit: the levels `+-v_1 +-v_2 ...` of least squared error, by alternation.

The nearest level of each weight gives its signs; for these the best scales follow from how many
weights there are at each level, and from their sums (least-squares binary quantization, arXiv
2001.02786). The two in turn never raise the error, but they end in the minimum nearest to where
they begin, of which there are hundreds. So several lanes begin in several places, and each goes on
from near the best that it has found, again and again (iterated local search). This is done on a
table of how many magnitudes lie above each of a row of thresholds, which one pass over the weights
gives; being smooth, it has fewer minima. The best ends then go on with the weights. Of few weights
a table tells too little: there all lanes do, for as long.

A level and its negative are one magnitude, named by its signs with v_1's taken as positive. Arrays
here have these 2**(bits - 1) magnitudes, or the bits, in front; then the lanes; then the axes of
the blocks. Lengths are in units of a block (`thresholds.UNITS`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.scale_fits import signs
from ab_jax.thresholds import UNITS, above, mean_excess

# Thresholds of the table, and of its intervals how many are for the bulk of the weights.
_EDGES, _NEAR = 64, 48
# Largest magnitudes are apart from the bulk if there are at most so many, relative.
_APART = 0.03
# Where to begin, in mean magnitudes: the best scales there are for normal weights, for Laplace's,
# even ones, a gamma distribution of shape 1/2, and two heaps, narrow and wide; twice, where minima
# of much the same depth lie apart.
_STARTS = {
    2: ((1.23, 0.66),),
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
# Rounds of alternation from each place, and by how much the logarithms of the scales of the next
# place differ from the best found.
_ROUNDS, _JUMP = 4, 0.2
# In a block of fewer weights than this all lanes go on with the weights, else so many.
_FEW, _KEPT = 32, 2
# Places of a lane, by bits: on the table and on the weights, of many and of few.
_OF_MANY = {3: (8, 1), 4: (14, 1)}
_OF_FEW = {3: (5, 8), 4: (5, 40)}

# From edges [magnitudes, starts, *blocks] to the fraction of weights whose magnitude is above each,
# and the sum of these over the number of all.
Above = Callable[[Array], tuple[Array, Array]]


@functools.partial(jax.export.register_namedtuple_serialization, serialized_name="ab_jax.BitLevels")
class BitLevels(NamedTuple):
    """The scales of the bits, and what the codes at them follow from.

    Axes are as in this file; what a quantizer fits has the first of each array as its last.

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

    Of blocks of 27 to 4096 normal weights 97 in 100 or more have at most 1.05 times the least
    error known, and the average is 1.00 to 1.01 times. Of 9 weights 98 have at 3 bits, but 95 at 4,
    where the average is 1.03 times and one in some hundred has 2 to 4 times. Of other distributions
    two narrow heaps are hardest: at 4 bits a fifth of blocks of 64 and more have up to 1.2 times.

    Args:
      w: floats.
      magnitude: the largest of each block (`scale_fits.magnitude`).
      bits: 3 or 4.
      axes: those of `w` that run inside a block; results keep them with size 1.

    Returns:
      The scales [bits, ...] over the largest magnitude, falling.
    """
    w, magnitude = jax.lax.stop_gradient((w, magnitude))
    of_table, mean, bulk = _table(w, magnitude, axes)
    inside = tuple(axis + 1 for axis in axes)

    def of_weights(edge: Array) -> tuple[Array, Array]:
        found = above(w[None], magnitude[None], edge.reshape(-1, *edge.shape[2:]), inside)
        fraction, total = (x.reshape(edge.shape) for x in found)
        return fraction, total

    few = math.prod(w.shape[axis] for axis in axes) < _FEW
    on_table, on_weights = (_OF_FEW if few else _OF_MANY)[bits]
    scales, lost = _searched(_starts(bits, mean, bulk), of_table, on_table)
    if not few:
        scales = _best(scales, lost, _KEPT)
    scales = _best(*_searched(scales, of_weights, on_weights), 1)
    # Divided before the sort: compilers would do it after the product with the magnitude.
    return -jnp.sort(-jnp.abs(scales[:, 0] / UNITS), axis=0)


def levels_at(scales: Array, unit: Array) -> BitLevels:
    """The levels of these scales [bits, ...], which are given over `unit` [...].

    Their order is found without the unit, which may be too large or too small for float32.
    """
    bits, one = scales.shape[0], jnp.ones_like(scales[:1])
    if bits == 2:  # v_1 - v_2 and v_1 + v_2 have v_1 between them
        edges, steps = scales[:1], jnp.concatenate([one, 2 * one])
    else:
        magnitudes, of_level = _levels(scales[:, None])
        codes = sum(sign * 2 ** (bits - 1 - i) for i, sign in enumerate(of_level))[:, 0]
        edges = _between(magnitudes)[:, 0]
        steps = codes - jnp.concatenate([0 * codes[:1], codes[:-1]])
    # The lowest level is the nearest from below 0 on, also where the unit is 0.
    return BitLevels(scales * unit[None], jnp.concatenate([-one, edges * unit[None]]), steps)


def codes(w: Array, levels: BitLevels) -> Array:
    """Codes as `BinaryCoded` has them, as floats of the shape of `w`."""
    beyond = (jnp.abs(w)[None] > levels.edges).astype(w.dtype)
    return signs(w) * jnp.sum(beyond * levels.steps, axis=0)


def _table(w: Array, magnitude: Array, axes: tuple[int, ...]) -> tuple[Above, Array, Array]:
    """What lies above an edge, read off a table; the mean magnitude, and that without outliers."""
    inside = tuple(axis + 1 for axis in axes)

    def excess_at(t: Array) -> Array:
        return mean_excess(w[None], magnitude[None], t + jnp.minimum(magnitude, 0)[None], inside)

    def column(numbers: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.asarray(numbers, w.dtype).reshape(-1, *(1,) * w.ndim)

    # The end of the bulk: the first power of two with few enough magnitudes above it. Without any
    # the table is even, else its last part is wider.
    powers = column([0, *UNITS * 0.5 ** np.arange(14, -1, -1)])
    excess = excess_at(jnp.asarray(powers))
    fractions = (excess[:-1] - excess[1:]) / np.diff(powers, axis=0)
    ends = jnp.where(fractions[1:] > _APART * fractions[:1], UNITS, powers[2:])
    end = jnp.minimum(jnp.min(ends, axis=0, keepdims=True), UNITS * _NEAR / (_EDGES - 1))
    width, wide = end / _NEAR, (UNITS - end) / (_EDGES - 1 - _NEAR)

    numbers = np.arange(_EDGES)
    inner, outer = np.minimum(numbers, _NEAR), np.maximum(numbers - _NEAR, 0)
    t = column(inner) * width + column(outer) * wide
    excess = excess_at(t)
    # In the middles of the intervals, and before the first one everything.
    fractions = (excess[:-1] - excess[1:]) / jnp.where(column(outer[1:]) > 0, wide, width)
    sums = (excess[:-1] + excess[1:]) / 2 + fractions * (t[:-1] + t[1:]) / 2
    fractions = jnp.concatenate([jnp.ones_like(excess[:1]), fractions, 0 * excess[:1]])
    sums = jnp.concatenate([excess[:1], sums, 0 * excess[:1]])

    def look_up(edge: Array) -> tuple[Array, Array]:
        flat = edge.reshape(-1, *edge.shape[2:])
        position = jnp.where(flat < end, flat / width, (flat - end) / wide + _NEAR)
        position = jnp.minimum(jnp.maximum(position + 0.5, 0), _EDGES - 0.5)
        index = jnp.floor(position)
        share, at = position - index, index.astype(int)
        found = (
            jnp.take_along_axis(x, at, axis=0, mode="clip") * (1 - share)
            + jnp.take_along_axis(x, at + 1, axis=0, mode="clip") * share
            for x in (fractions, sums)
        )
        first, second = (x.reshape(edge.shape) for x in found)
        return first, second

    return look_up, excess[0], excess[0] - excess[_NEAR]


def _starts(bits: int, mean: Array, bulk: Array) -> Array:
    """[bits, lanes, *blocks]"""
    halves = 0.5 ** np.arange(1, bits + 1)
    first, *others = _STARTS[bits - 1][0]
    rest = sum(others)  # that the outermost level is the largest magnitude
    apart = ((first - rest) / 2, (-first - rest) / 2, *others)
    of_mean = [*_STARTS[bits], np.zeros(bits), apart]
    # Two more: even levels up to the largest magnitude; and that magnitude and its negative beside
    # levels for normal weights, between which v_1 and v_2 nearly cancel.
    of_largest = np.zeros((len(of_mean), bits))
    of_largest[-2], of_largest[-1, :2] = halves / halves.sum(), 0.5
    shape = bits, len(of_mean), *(1,) * mean.ndim
    relative, fixed = (
        np.asarray(rows, mean.dtype).T.reshape(shape) for rows in (of_mean, UNITS * of_largest)
    )
    means = jnp.stack([mean] * (len(of_mean) - 1) + [bulk])
    return jnp.asarray(relative) * means[None] + jnp.asarray(fixed)


def _searched(scales: Array, of: Above, places: int) -> tuple[Array, Array]:
    """The best scales that each lane finds, beginning in so many places; and what they lose.

    The first place is given, and each other one is near the best found before.
    """
    # Any numbers would do, if always the same.
    jumps = np.random.default_rng(0).normal(0, _JUMP, (places, *scales.shape[:2]))
    jumps = jumps.reshape(*jumps.shape, *(1,) * (scales.ndim - 2))
    factors = jnp.asarray(np.exp(jumps), scales.dtype)

    def one_round(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        scales, best, least = state
        improved, lost = _improved(scales, of)
        # What follows loses no more, even where rounding hides by how much less.
        best = jnp.where((lost < least)[None], improved, best)
        nearby = best * jax.lax.dynamic_index_in_dim(factors, i // _ROUNDS, keepdims=False)
        leaves = (i + 1) % _ROUNDS == 0
        return jnp.where(leaves, nearby, improved), best, jnp.minimum(lost, least)

    state = scales, scales, jnp.maximum(scales[0], jnp.inf)
    _, best, least = jax.lax.fori_loop(0, places * _ROUNDS, one_round, state)
    return best, least


def _best(scales: Array, lost: Array, count: int) -> Array:
    """The scales of so many lanes, those that lose least: [bits, count, *blocks]."""
    order = jnp.argsort(lost, axis=0)[:count]
    return jnp.take_along_axis(scales, order[None], axis=1, mode="clip")


def _levels(scales: Array) -> tuple[Array, Array]:
    """The magnitudes of the levels, rising, [magnitudes, starts, *blocks]; and the signs of each.

    The signs [bits, magnitudes, ...] are those whose sum is positive, v_1's too.
    """
    bits = scales.shape[0]
    count = 2 ** (bits - 1)
    numbers = np.arange(count, dtype=np.int32).reshape(-1, *(1,) * (scales.ndim - 1))
    levels = jnp.abs(_signed(scales, _signs_of(numbers, bits)))
    # Sorted with their numbers in the last bits. By comparing each with each, as XLA on CPUs sorts
    # so few ten times slower.
    keys = jax.lax.bitcast_convert_type(levels.astype(jnp.float32), jnp.int32)
    keys = (keys & np.int32(-count)) | numbers
    rank = jnp.sum(keys[None] < keys[:, None], axis=1, dtype=jnp.int32)
    number = jnp.sum(jnp.where(rank[None] == numbers[:, None], numbers, 0), axis=1, dtype=jnp.int32)
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


def _between(magnitudes: Array) -> Array:
    """From where on each of the rising magnitudes but the lowest is the nearest."""
    return magnitudes[1:] / 2 + magnitudes[:-1] / 2


def _groups(magnitudes: Array, of: Above) -> tuple[Array, Array]:
    """The fraction of weights that are nearest to each level, and the sum of their magnitudes."""
    edges = jnp.concatenate([jnp.full_like(magnitudes[:1], -1), _between(magnitudes)])
    counts, sums = (x - jnp.concatenate([x[1:], 0 * x[:1]]) for x in of(edges))
    return counts, sums


def _improved(scales: Array, of: Above) -> tuple[Array, Array]:
    """The scales after one round of alternation; and the error before, less the mean square."""
    magnitudes, of_level = _levels(scales)
    counts, sums = _groups(magnitudes, of)
    bits = range(scales.shape[0])
    pairs = tuple(itertools.combinations(bits, 2))
    lost, *found = _sums(
        (counts * magnitudes - 2 * sums) * magnitudes,
        *(of_level[i] * sums for i in bits),
        *(of_level[i] * of_level[j] * counts for i, j in pairs),
    )
    target, overlap = found[: len(bits)], dict(zip(pairs, found[len(bits) :], strict=True))
    v = list(scales)
    for _ in range(4):  # one scale at a time, given the others, as two may be of no account
        for i in bits:
            others = (overlap[min(i, j), max(i, j)] * v[j] for j in bits if j != i)
            v[i] = target[i] - sum(others)
    return jnp.stack(v), lost


def _sums(*terms: Array) -> Sequence[Array]:
    """Each summed over its first axis; all in one go, which XLA on CPUs does eight times faster."""
    zeros = (np.zeros((), terms[0].dtype),) * len(terms)

    def add(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
        return [a + b for a, b in zip(one, other, strict=True)]

    summed: Sequence[Array] = jax.lax.reduce(terms, zeros, add, (0,))
    return summed
