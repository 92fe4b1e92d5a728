"""LeastSquaresBinary: its scales against brute force in float64, its codes by their digits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax import (
    Binary,
    BinaryCoded,
    LeastSquaresBinary,
    Quantized,
    Rules,
    Ternary,
    Uniform,
    dequantize,
    describe,
    quantize,
)
from benchmarks.measuring import least_errors

SHAPE = (60, 5)
each_width = pytest.mark.parametrize("bits", [2, 3, 4])


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    """Five channels of 60 weights: flat, round, with heavy tails, of one sign, with two humps."""
    return np.stack(
        [
            rng.uniform(-1, 1, SHAPE[0]),
            rng.normal(size=SHAPE[0]),
            rng.standard_t(3, size=SHAPE[0]),
            rng.gamma(1.0, size=SHAPE[0]),
            np.sign(rng.normal(size=SHAPE[0])) + 0.05 * rng.normal(size=SHAPE[0]),
        ],
        axis=1,
        dtype=np.float32,
        casting="same_kind",
    )


def signs_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """The signs `[bits, ...]` whose weighted sum is the code, found by looking it up."""
    table = {
        sum(s * 2 ** (bits - 1 - i) for i, s in enumerate(signs)): signs
        for signs in itertools.product((-1, 1), repeat=bits)
    }
    assert len(table) == 2**bits
    return np.moveaxis(np.array([table[int(c)] for c in codes.ravel()]), 1, 0).reshape(
        bits, *codes.shape
    )


def values(quantized: Quantized) -> np.ndarray:
    """The signed sums of the scales in float64; one scale a channel."""
    scales = np.moveaxis(np.asarray(quantized.scale, np.float64), -1, 0)
    return (signs_of(np.asarray(quantized.codes), quantized.bits) * scales).sum(0)


@pytest.mark.parametrize("sharing", [{}, {"axis": None}, {"group_size": 20}], ids=str)
def test_one_bit_is_binary_bit_for_bit(weights, sharing):
    found = LeastSquaresBinary(bits=1, **sharing).quantize(weights)
    wanted = Binary(**sharing).quantize(weights)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@each_width
def test_codes_are_odd_and_their_digits_are_signs(weights, bits):
    weights[7] = [0.0, -0.0, 0.0, -0.0, 0.0]
    quantized = LeastSquaresBinary(bits=bits).quantize(weights)
    assert isinstance(quantized, BinaryCoded)
    codes = np.asarray(quantized.codes)
    assert (codes.dtype, codes.shape, quantized.bits) == (np.int8, SHAPE, bits)
    assert (quantized.scale.dtype, quantized.scale.shape) == (np.float32, (1, SHAPE[1], bits))
    assert quantized.zero_point is None
    found = np.asarray(quantized.dequantize())
    assert (found[7] >= 0).all()
    np.testing.assert_allclose(found, values(quantized), rtol=1e-6, atol=1e-6)
    jitted = jax.jit(lambda quantized: quantized.dequantize())(quantized)
    np.testing.assert_array_equal(jitted, found)


def test_two_bits_lose_the_least_that_any_two_scales_lose(weights):
    quantized = LeastSquaresBinary(bits=2).quantize(weights)
    w = weights.astype(np.float64)
    found = ((w - values(quantized)) ** 2).sum(0)
    v1, v2 = np.asarray(quantized.scale, np.float64)[0].T
    assert (v1 >= v2).all()
    assert (v2 >= 0).all()
    for channel, error in enumerate(found):
        rising = np.sort(np.abs(w[:, channel]))
        # Whichever magnitudes go together: the best two values of two groups are their means.
        best = min(
            sum(((group - group.mean()) ** 2).sum() for group in np.split(rising, [k]))
            for k in range(1, len(rising))
        )
        np.testing.assert_allclose(error, best, rtol=1e-5, atol=1e-9)


def test_two_bits_against_all_codes_there_are(rng):
    w = rng.normal(size=(5, 3))
    found = LeastSquaresBinary(bits=2).quantize(w.astype(np.float32))
    error = ((w - values(found)) ** 2).sum(0)
    for channel in range(w.shape[1]):
        errors = []
        for signs in itertools.product((-1.0, 1.0), repeat=10):
            basis = np.reshape(signs, (5, 2))
            fitted, *_ = np.linalg.lstsq(basis, w[:, channel])
            errors.append(((basis @ fitted - w[:, channel]) ** 2).sum())
        np.testing.assert_allclose(error[channel], min(errors), rtol=1e-4, atol=1e-9)


def alternated_from_anywhere(
    w: np.ndarray, bits: int, rng: np.random.Generator, starts: int = 200
) -> float:
    """The least error that alternation in float64 finds for a block, from many random scales."""
    magnitudes = np.abs(w.astype(np.float64))
    rows = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=bits - 1)], float)
    scales = -np.sort(-rng.dirichlet(np.ones(bits), starts), axis=1)
    scales *= rng.uniform(1.2, 5, (starts, 1)) * magnitudes.mean()
    for _ in range(40):
        levels = scales @ rows.T
        nearest = np.abs(magnitudes[None, :, None] - np.abs(levels)[:, None]).argmin(2)
        signs = rows[nearest] * np.sign(np.take_along_axis(levels, nearest, 1))[..., None]
        normal = np.einsum("swb,swc->sbc", signs, signs) + 1e-9 * np.eye(bits)
        rest = magnitudes - np.einsum("swb,sb->sw", signs, scales)
        right = np.einsum("swb,sw->sb", signs, rest)
        scales = scales + np.linalg.solve(normal, right[..., None])[..., 0]
    off = np.abs(magnitudes[None, :, None] - np.abs(scales @ rows.T)[:, None]).min(2)
    return float(np.square(off).sum(1).min())


@pytest.mark.parametrize(("bits", "mean", "most"), [(3, 1.02, 1.2), (4, 1.03, 1.3)])
def test_more_bits_lose_little_more_than_the_least(rng, bits, mean, most):
    w = rng.normal(size=(64, 16)).astype(np.float32)
    found = ((w - values(LeastSquaresBinary(bits=bits).quantize(w))) ** 2).sum(0)
    ratios = found / [alternated_from_anywhere(channel, bits, rng) for channel in w.T]
    assert ratios.mean() < mean
    assert ratios.max() < most
    # Greedy scales, which sources begin with, are no match: the comparison can tell.
    rest = w.astype(np.float64)
    for _ in range(bits):
        rest = rest - np.sign(rest) * np.abs(rest).mean(0)
    assert (found / (rest**2).sum(0)).mean() < (0.8 if bits == 3 else 0.5)


# Of how many blocks the error is near the least. The fewer weights, the more minima are as narrow.
@pytest.mark.parametrize(
    ("bits", "count", "share"),
    [(3, 9, 0.9), (4, 9, 0.8), (3, 27, 0.9), (4, 27, 0.85), (4, 64, 0.8)],
)
def test_most_blocks_of_any_kind_lose_little_more_than_the_least(rng, bits, count, share):
    w = least_errors.drawn(rng, count, channels=8)
    value = np.asarray(LeastSquaresBinary(bits=bits).quantize(w).dequantize(), np.float64)
    found, squares = np.square(w - value).sum(0), np.square(w.astype(np.float64)).sum(0)
    least = least_errors.bit_scales(w, bits, 200, rng)
    near = (found <= 1.05 * least) | (found <= 1e-6 * squares)
    assert near.mean() >= share
    assert (found <= least + 0.01 * squares).all()


@each_width
def test_the_levels_taken_are_the_nearest(weights, bits):
    quantized = LeastSquaresBinary(bits=bits).quantize(weights)
    levels = np.asarray(quantized.levels(), np.float64)[:, 0]
    off = np.abs(weights[None] - levels[:, None]).min(0)
    np.testing.assert_allclose(np.abs(weights - values(quantized)), off, rtol=1e-4, atol=1e-6)


@each_width
def test_values_of_codes_are_quantized_to_themselves(rng, bits):
    """Of normal weights; in a channel of some hundred, another end may seem as good."""
    w = rng.normal(size=(512, 32)).astype(np.float32)
    once = np.asarray(LeastSquaresBinary(bits=bits).quantize(w).dequantize())
    twice = np.asarray(LeastSquaresBinary(bits=bits).quantize(once).dequantize())
    moved = (np.abs(twice - once) > 1e-4 * np.abs(once).max(0)).any(0)
    assert moved.sum() <= (0 if bits == 2 else 1)


def test_more_bits_lose_less(weights):
    errors = [
        ((weights - LeastSquaresBinary(bits=bits).quantize(weights).dequantize()) ** 2).sum(0)
        for bits in (1, 2, 3, 4)
    ]
    # A greedy fit need not beat the best one with a bit less.
    for fewer, more in ((0, 1), (0, 2), (2, 3)):
        assert (errors[more] < errors[fewer]).all()


def test_blocks_are_quantized_as_columns_of_a_matrix_would_be(rng):
    bits = 2
    w = rng.normal(size=(2, 6, 4)).astype(np.float32)
    found = LeastSquaresBinary(bits=bits, group_size=3).quantize(w)
    assert found.scale.shape == (1, 2, 4, bits)
    columns = w.reshape(2, 2, 3, 4).transpose(0, 2, 1, 3).reshape(6, 8)
    wanted = LeastSquaresBinary(bits=bits).quantize(columns)
    np.testing.assert_allclose(found.scale.reshape(8, bits), wanted.scale[0], rtol=1e-6)
    back = np.asarray(wanted.dequantize()).reshape(2, 3, 2, 4).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found.dequantize(), back.reshape(w.shape), rtol=1e-5, atol=1e-6)


def test_half_precision_is_quantized_in_float32_and_comes_back(weights):
    half = jnp.asarray(weights, jnp.bfloat16)
    quantized = LeastSquaresBinary(bits=3).quantize(half)
    assert quantized.scale.dtype == jnp.float32
    single = LeastSquaresBinary(bits=3).quantize(half.astype(jnp.float32))
    np.testing.assert_array_equal(
        quantized.dequantize(), single.dequantize().astype(jnp.bfloat16), strict=True
    )


def test_float64_keeps_its_digits(rng):
    w = rng.normal(size=(30, 2))
    with jax.enable_x64(True):
        quantized = LeastSquaresBinary(bits=2).quantize(w)
        assert quantized.scale.dtype == quantized.dequantize().dtype == jnp.float64
        found = ((w - values(quantized)) ** 2).sum(0)
    rising = np.sort(np.abs(w), axis=0)
    best = [
        min(sum(((g - g.mean()) ** 2).sum() for g in np.split(c, [k])) for k in range(1, 30))
        for c in rising.T
    ]
    np.testing.assert_allclose(found, best, rtol=1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_extreme_channels(rng, bits):
    n = SHAPE[0]
    w = rng.normal(size=n)
    w = np.stack([np.zeros(n), np.full(n, -3.0), w * 2.0**-100, w * 2.0**100, w], axis=1)
    found = np.asarray(LeastSquaresBinary(bits=bits).quantize(w.astype(np.float32)).dequantize())
    np.testing.assert_array_equal(found[:, 0], 0.0)
    np.testing.assert_allclose(found[:, 1], -3.0, rtol=1e-6)
    for channel, factor in ((2, 2.0**-100), (3, 2.0**100)):
        np.testing.assert_allclose(found[:, channel] / factor, found[:, 4], rtol=1e-6)


def relative_error(w, bits):
    """The squared error of each channel over its squares, in units of its largest."""
    found = np.asarray(LeastSquaresBinary(bits=bits).quantize(w).dequantize()).astype(np.float64)
    w = np.asarray(w).astype(np.float64)
    largest = np.abs(w).max(0)
    return np.square((w - found) / largest).sum(0) / np.square(w / largest).sum(0)


@each_width
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_largest_weights_there_are_lose_as_much_as_others(rng, bits, dtype):
    w = rng.normal(size=(64, 100))
    w[:, 0] = np.resize([1.0, 0.5, -0.2, 0.3], 64)
    # Up to the largest number at the last power of two; products with these are exact.
    w = jnp.asarray(w / np.abs(w).max(0) * float(jnp.finfo(dtype).max) / 2.0**127, dtype)
    wanted = relative_error(w, bits)
    for factor in (2.0**125, 2.0**126, 2.0**127):
        found = relative_error(w * jnp.asarray(factor, dtype), bits)
        # Alternation may end elsewhere where the last bits of a sum differ: a channel may gain or
        # lose a quarter, their mean does not.
        np.testing.assert_allclose(found.mean(), wanted.mean(), rtol=0.05, atol=1e-9)


@each_width
def test_float64_is_quantized_alike_at_all_magnitudes(rng, bits):
    w = rng.normal(size=(64, 100))
    w /= np.abs(w).max(0)
    with jax.enable_x64(True):
        wanted = relative_error(w, bits).mean()
        for factor in (2.0**-960, 2.0**-150, 2.0**130, 2.0**1023):
            np.testing.assert_allclose(relative_error(w * factor, bits).mean(), wanted, rtol=0.05)


@pytest.mark.parametrize(
    ("count", "outliers", "size"),
    [(100, 2, 1000), (300, 1, 100), (300, 1, 1000), (576, 1, 1000), (576, 5, 1000), (2048, 1, 300)],
)
def test_a_bit_more_loses_less_beside_outliers(rng, count, outliers, size):
    w = rng.normal(size=(count, 16)).astype(np.float32)
    w[:outliers] = size
    errors = [
        np.square(w - np.asarray(LeastSquaresBinary(bits=bits).quantize(w).dequantize())).sum(0)
        for bits in (1, 2, 3, 4)
    ]
    for fewer, more in itertools.pairwise(errors):
        assert (more < 0.7 * fewer).all()


@pytest.mark.parametrize("quantizer", [Binary(), LeastSquaresBinary(bits=1)], ids=repr)
@pytest.mark.parametrize("count", [3, 41, 1000])  # times 1 / count may be above 1 in float32
def test_the_mean_of_the_largest_floats_is_finite(quantizer, count):
    largest = np.finfo(np.float32).max
    w = np.full((count, 2), largest)
    w[:, 1] *= -1
    found = np.asarray(quantizer.quantize(w).dequantize())
    np.testing.assert_allclose(found / largest, w / largest, rtol=1e-5)
    w[0] = np.inf, np.nan
    scale = np.asarray(quantizer.quantize(w).scale)[0]
    assert np.isnan(scale).all()


def test_a_weight_alone_in_its_block_is_kept(rng):
    w = rng.normal(size=(1, 6)).astype(np.float32)
    for bits in (2, 3):
        found = LeastSquaresBinary(bits=bits).quantize(w).dequantize()
        np.testing.assert_allclose(found, w, rtol=1e-6)


@pytest.mark.parametrize("count", [41, 47, 55, 61, 83, 97])  # times 1 / count is not 1 in float32
def test_one_magnitude_is_kept(rng, count):
    w = np.where(rng.random((count, 5)) < 0.5, -1, 1) * rng.uniform(1, 3, 5)
    found = LeastSquaresBinary(bits=2).quantize(w.astype(np.float32)).dequantize()
    np.testing.assert_allclose(found, w, rtol=1e-5)


LEVELLED = [
    (Binary(), 2),
    (Binary(fixed_scale=0.3, axis=None), 2),
    (Ternary(), 3),
    (Uniform(bits=2, scale="absmax", group_size=20), 3),
    (Uniform(bits=3, symmetric=False, scale="absmax"), 8),
    (LeastSquaresBinary(bits=2, group_size=20), 4),
    (LeastSquaresBinary(bits=4), 16),
]


@jax.jit
def sides(quantized, w):
    return quantized.levels(), *quantized.beside(w), quantized.dequantize()


@pytest.mark.parametrize(("quantizer", "count"), LEVELLED, ids=repr)
def test_the_levels_beside_a_weight(weights, quantizer, count):
    levels, below, above, dequantized = map(np.asarray, sides(quantizer.quantize(weights), weights))
    assert levels.shape == (count, *quantizer.scale_shape(SHAPE))
    assert (np.diff(levels, axis=0) >= 0).all()
    # Each weight's own levels, the scales of a block spread over it.
    blocks = [size // k for size, k in zip(SHAPE, levels.shape[1:], strict=True)]
    spread = np.kron(levels, np.ones((1, *blocks)))
    assert (np.abs(spread - dequantized).min(0) == 0).all()
    assert below.dtype == above.dtype == np.float32
    inside = np.clip(weights, spread[0], spread[-1])
    # A weight on a level, to rounding, may be taken to be on either side of it.
    clear = (np.abs(spread - weights).min(0) > 1e-5) | (inside != weights)
    assert clear.mean() > 0.7
    np.testing.assert_allclose(
        below[clear], np.where(spread <= inside, spread, -np.inf).max(0)[clear], rtol=1e-6
    )
    np.testing.assert_allclose(
        above[clear], np.where(spread >= inside, spread, np.inf).min(0)[clear], rtol=1e-6
    )
    assert (below <= inside + 1e-5).all()
    assert (inside <= above + 1e-5).all()


def test_rules_quantize_and_describe_it(weights):
    params = {"kernel": jnp.asarray(weights), "bias": jnp.ones(5)}
    rules = Rules([("kernel", LeastSquaresBinary(bits=3)), ("bias", None)])
    quantized = quantize(params, rules)
    np.testing.assert_array_equal(
        dequantize(quantized)["kernel"], LeastSquaresBinary(bits=3).quantize(weights).dequantize()
    )
    rows = {row.path: row for row in describe(params, rules).rows}
    # 300 codes of 3 bits, and 3 scales in float32 for each of 5 channels.
    assert rows["kernel"].bytes_after == -(-300 * 3 // 8) + 3 * 5 * 4
    assert "LeastSquaresBinary" in str(describe(params, rules))


@pytest.mark.parametrize("bits", [0, 5, 2.0, "2"])
def test_a_width_that_there_is_not_is_refused(bits):
    with pytest.raises(ValueError, match=r"takes 1 to 4 bits, not bits="):
        LeastSquaresBinary(bits=bits)
