"""Codes, scales and zero points, each held against NumPy in float64.

Most tests share the shape of `weights`, since compiling a fit takes longer than running it.
"""

import dataclasses
import itertools
import pickle
import re

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax import (
    Binary,
    LeastSquaresBinary,
    Quantized,
    Rules,
    Ternary,
    Uniform,
    alpha_blend,
    describe,
    quantize,
    scale_fits,
)

# One of each kind that the tests of conventions, layouts and extremes go through.
KINDS = [
    Binary(),
    Binary(fixed_scale=1.0),
    Ternary(),
    Ternary(scale="absmean"),
    Uniform(bits=4),
    Uniform(bits=8, symmetric=False),
    Uniform(bits=3, scale="absmax"),
    Uniform(bits=8, symmetric=False, scale="absmax"),
]
FITTED = [q for q in KINDS if getattr(q, "fixed_scale", None) is None]

each_kind = pytest.mark.parametrize("quantizer", KINDS, ids=repr)

SHAPE = (256, 28)


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    """28 channels of 256 weights: four channels each of seven distributions."""
    size = (SHAPE[0], 4)
    return np.concatenate(
        [
            rng.normal(size=size),
            rng.normal(1.0, 1.0, size=size),
            rng.laplace(size=size),
            rng.uniform(-1, 1, size=size),
            rng.standard_t(3, size=size),  # heavy tails
            rng.gamma(1.0, size=size),  # one sign
            np.sign(rng.normal(size=size)) + 0.05 * rng.normal(size=size),  # two humps
        ],
        axis=1,
        dtype=np.float32,
        casting="same_kind",
    )


def code_range(quantizer) -> tuple[int, int]:
    """The lowest and the highest code, as the conventions state them."""
    if not isinstance(quantizer, Uniform):
        return -1, 1
    half = 2 ** (quantizer.bits - 1)
    return (-(half - 1) if quantizer.symmetric else -half), half - 1


def values(quantized: Quantized) -> np.ndarray:
    """`(codes - zero_point) * scale` in NumPy and float64, for scales of any block form."""
    codes = np.asarray(quantized.codes, np.float64)
    scale = np.asarray(quantized.scale, np.float64)
    zero_point = np.zeros(scale.shape)
    if quantized.zero_point is not None:
        zero_point = np.asarray(quantized.zero_point, np.float64)
    assert scale.shape == zero_point.shape
    assert scale.ndim == codes.ndim
    for axis, (size, count) in enumerate(zip(codes.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, size // count, axis)
        zero_point = np.repeat(zero_point, size // count, axis)
    return (codes - zero_point) * scale


def squared_error(w: np.ndarray, quantized: Quantized) -> np.ndarray:
    """Per channel (the last axis), in float64."""
    return np.sum((w.astype(np.float64) - values(quantized)) ** 2, axis=0)


def clear(steps: np.ndarray) -> np.ndarray:
    """Where a code is clear, and not in the middle between two to within rounding."""
    return np.abs(np.abs(steps - np.round(steps)) - 0.5) > 1e-4


def assert_same_fit(found: Quantized, wanted: Quantized, w: np.ndarray) -> None:
    """Equal scales up to the order of summation, and equal codes.

    A weight that sits in the middle between two levels to within rounding may take either.
    """
    np.testing.assert_allclose(found.scale, wanted.scale, rtol=2e-6)
    if wanted.zero_point is not None:
        np.testing.assert_array_equal(found.zero_point, wanted.zero_point)
    at = clear(w.astype(np.float64) / np.asarray(wanted.scale, np.float64))
    assert at.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(found.codes)[at], np.asarray(wanted.codes)[at])


# Binary


def test_binary_codes_are_signs_and_zero_counts_as_plus_one():
    w = np.asarray([[-2.0], [-0.0], [0.0], [1e-45], [-1e-45], [3.0]], np.float32)
    codes = np.asarray(Binary().quantize(w).codes)[:, 0]
    # A negative subnormal may count as zero, as it does wherever these are flushed.
    np.testing.assert_array_equal(codes[[0, 1, 2, 3, 5]], [-1, 1, 1, 1, 1])


def test_binary_scale_is_the_mean_magnitude_and_beats_every_other_scale(weights):
    quantized = Binary().quantize(weights)
    w = weights.astype(np.float64)
    np.testing.assert_allclose(quantized.scale, np.abs(w).mean(0, keepdims=True), rtol=1e-6)

    grid = np.linspace(0.01, 3, 1000)[:, None, None] * np.abs(w).mean(0)
    brute_force = np.min(np.sum((w - np.sign(w) * grid) ** 2, axis=1), axis=0)
    assert (squared_error(weights, quantized) <= brute_force * (1 + 1e-6)).all()


def test_binary_fixed_scale(weights):
    quantized = Binary(fixed_scale=0.25).quantize(weights)
    np.testing.assert_array_equal(quantized.scale, np.full((1, SHAPE[1]), 0.25))
    np.testing.assert_array_equal(quantized.dequantize(), np.where(weights >= 0, 0.25, -0.25))


# Ternary


def test_ternary_against_exhaustive_search_over_thresholds(weights):
    w = weights.astype(np.float64)
    best = np.full(SHAPE[1], np.inf)
    for threshold in np.sort(np.abs(w), axis=0):
        codes = np.sign(w) * (np.abs(w) >= threshold)
        scale = np.sum(w * codes, axis=0) / np.sum(codes**2, axis=0)
        best = np.minimum(best, np.sum((w - codes * scale) ** 2, axis=0))

    np.testing.assert_allclose(squared_error(weights, Ternary().quantize(weights)), best, rtol=1e-6)
    # The constant of Ternary Weight Networks is worse: the comparison can tell the two apart.
    heuristic = np.sign(w) * (np.abs(w) > 0.7 * np.abs(w).mean(0))
    scale = np.sum(w * heuristic, axis=0) / np.sum(heuristic**2, axis=0)
    assert (np.sum((w - heuristic * scale) ** 2, axis=0) > best * (1 + 1e-4)).any()


def test_ternary_against_all_codes_there_are(rng):
    w = rng.normal(size=(6, 40)).astype(np.float32)
    best = np.sum(w.astype(np.float64) ** 2, axis=0)  # all codes 0
    for codes in itertools.product((-1.0, 0.0, 1.0), repeat=6):
        q = np.asarray(codes)[:, None]
        if q.any():
            scale = np.sum(w * q, axis=0) / np.sum(q * q)
            best = np.minimum(best, np.sum((w - q * scale) ** 2, axis=0))
    found = squared_error(w, Ternary().quantize(w))
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sharing", [{}, {"axis": None}, {"group_size": 32}], ids=str)
def test_absmean_is_the_ternary_of_bitnet(weights, sharing):
    """`clip(round(w / gamma), -1, 1) * gamma` with `gamma = mean |w|` (arXiv 2402.17764)."""
    quantizer = Ternary(scale="absmean", **sharing)
    quantized = quantizer.quantize(weights)
    w = weights.astype(np.float64)
    for i, block in enumerate(blocks_of(SHAPE, quantizer.scale_shape(SHAPE))):
        gamma = np.abs(w[block]).mean()
        np.testing.assert_allclose(np.ravel(quantized.scale)[i], gamma, rtol=1e-6)
        codes, at = np.clip(np.round(w[block] / gamma), -1, 1), clear(w[block] / gamma)
        np.testing.assert_array_equal(np.asarray(quantized.codes)[block][at], codes[at])
        assert at.mean() > 0.9
    # Least squares are another scale and, of some distributions, other codes.
    fitted = dataclasses.replace(quantizer, scale="least_squares").quantize(weights)
    assert (np.asarray(fitted.scale) > np.asarray(quantized.scale) * 1.01).any()
    assert (np.asarray(fitted.codes) != np.asarray(quantized.codes)).any()


def test_an_absmean_of_equal_weights_is_no_larger_than_they_are():
    """Sums of equal magnitudes round; of the largest float they would be infinite."""
    w = np.full((6, 3), np.finfo(np.float32).max)
    w[:, 1], w[:, 2] = -0.1, [np.nan, *[1.0] * 5]
    quantized = Ternary(scale="absmean").quantize(w)
    np.testing.assert_allclose(quantized.scale, [[w[0, 0], 0.1, np.nan]], rtol=1e-6)
    np.testing.assert_allclose(quantized.dequantize()[:, :2], w[:, :2], rtol=1e-6)
    assert (np.asarray(quantized.scale)[0, :2] <= np.abs(w[0, :2])).all()


# Uniform


def range_of(w: np.ndarray, symmetric: bool) -> np.ndarray:
    """What the levels span when nothing is clipped: on one side of 0 if symmetric."""
    if symmetric:
        return np.abs(w).max(0)
    return np.maximum(w.max(0), 0) - np.minimum(w.min(0), 0)


def error_at(w, scale, zero_point, lowest, highest) -> np.ndarray:
    q = np.clip(np.round(w / scale), lowest - zero_point, highest - zero_point)
    return np.sum((w - q * scale) ** 2, axis=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_least_squares_against_a_grid_of_scales_and_absmax(weights, bits, symmetric):
    quantizer = Uniform(bits=bits, symmetric=symmetric)
    quantized = quantizer.quantize(weights)
    lowest, highest = code_range(quantizer)
    codes = np.asarray(quantized.codes)
    assert codes.min() >= lowest
    assert codes.max() <= highest

    w = weights.astype(np.float64)
    zero_point = 0.0 if symmetric else np.asarray(quantized.zero_point[0], np.float64)
    levels_on_the_range = highest if symmetric else highest - lowest
    absmax = range_of(w, symmetric) / levels_on_the_range
    error = squared_error(weights, quantized)
    assert (error <= error_at(w, absmax, zero_point, lowest, highest) * (1 + 1e-5)).all()

    grid = [
        error_at(w, absmax * ratio, zero_point, lowest, highest)
        for ratio in np.linspace(0.05, 1.5, 600)
    ]
    ratio = error / np.min(grid, axis=0)
    # The more levels, the more local minima; those that remain at 6 bits and more are shallow.
    assert ratio.mean() < (1.03 if bits <= 5 else 1.1)
    assert ratio.max() < 1.6
    # The codes are the nearest ones at this scale, but for middles between two levels.
    nearest = np.clip(
        np.round(w / np.asarray(quantized.scale, np.float64)) + zero_point, lowest, highest
    )
    assert (codes == nearest).mean() > 0.999


@pytest.mark.parametrize(("bits", "outlier"), [(2, 3.0), (3, 4.5)])
def test_least_squares_leaves_the_poor_minimum_that_absmax_leads_into(rng, bits, outlier):
    """Weights near 2 or 7 levels, and one outlier that spoils the scale for all the others."""
    highest = 2 ** (bits - 1) - 1
    levels = [n for n in range(-highest, highest + 1) if n or bits > 2]
    w = (rng.choice(levels, size=SHAPE) + 0.05 * rng.normal(size=SHAPE)).astype(np.float32)
    w[0] = outlier
    exact = w.astype(np.float64)
    scale = np.abs(exact).max(0) / highest
    for _ in range(100):
        q = np.clip(np.round(exact / scale), -highest, highest)
        scale = np.sum(exact * q, axis=0) / np.sum(q * q, axis=0)
    stuck = error_at(exact, scale, 0, -highest, highest)
    grid = np.linspace(0.1, 5, 800)
    best = np.min([error_at(exact, s, 0, -highest, highest) for s in grid], axis=0)
    error = squared_error(w, Uniform(bits=bits).quantize(w))
    assert (error <= best * 1.1).all()
    assert (stuck > best * 2).mean() > 0.9  # or the test would show nothing


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_absmax_spans_the_range_and_reaches_both_ends(weights, bits, symmetric):
    quantizer = Uniform(bits=bits, symmetric=symmetric, scale="absmax")
    weights[0] = 0.0  # which is the low end of channels that have one sign
    quantized = quantizer.quantize(weights)
    lowest, highest = code_range(quantizer)
    w = weights.astype(np.float64)
    steps = highest if symmetric else highest - lowest
    np.testing.assert_allclose(quantized.scale[0], range_of(w, symmetric) / steps, rtol=1e-6)
    codes = np.asarray(quantized.codes)
    if symmetric:
        assert quantized.zero_point is None
        np.testing.assert_array_equal(np.abs(codes).max(0), highest)
        np.testing.assert_array_equal(
            np.sign(codes[np.abs(w).argmax(0), range(SHAPE[1])]),
            np.sign(w[np.abs(w).argmax(0), range(SHAPE[1])]),
        )
    else:
        zero_point = np.asarray(quantized.zero_point)
        assert ((lowest <= zero_point) & (zero_point <= highest)).all()
        np.testing.assert_array_equal(codes.min(0), lowest)
        # Where both ends lie in the middle between two levels, the upper one may be a code short.
        both = clear(np.minimum(w.min(0), 0) / np.asarray(quantized.scale[0], np.float64))
        assert both.mean() > 0.9
        np.testing.assert_array_equal(codes.max(0)[both], highest)
    # Nothing is clipped: no weight is further from its value than half a step (affine: the rounding
    # of the zero point adds up to another half at the ends).
    off = np.abs(w - values(quantized)) / np.asarray(quantized.scale, np.float64)
    assert off.max() <= (0.5 if symmetric else 1.0) + 1e-4


# Conventions that hold for all


@each_kind
def test_codes_and_what_they_stand_for(weights, quantizer):
    weights[7] = 0.0
    quantized = quantizer.quantize(weights)
    lowest, highest = code_range(quantizer)
    codes = np.asarray(quantized.codes)
    assert quantized.codes.dtype == jnp.int8
    assert quantized.scale.dtype == jnp.float32
    assert quantized.codes.shape == weights.shape
    assert quantized.scale.shape == quantizer.scale_shape(SHAPE) == (1, SHAPE[1])
    assert quantized.bits == {Binary: 1, Ternary: 2}.get(type(quantizer)) or quantizer.bits
    assert (quantized.zero_point is None) == getattr(quantizer, "symmetric", True)
    assert (lowest, highest) == (codes.min(), codes.max()) or quantizer.bits == 8
    assert lowest <= codes.min()
    assert codes.max() <= highest
    assert (np.asarray(quantized.scale) > 0).all()

    dequantized = np.asarray(quantized.dequantize())
    assert dequantized.dtype == np.float32
    np.testing.assert_array_equal(dequantized, values(quantized).astype(np.float32))
    if isinstance(quantizer, Binary):
        assert set(np.unique(codes)) == {-1, 1}
        assert (codes[7] == 1).all()
    else:
        np.testing.assert_array_equal(dequantized[7], 0.0)  # zero stays zero


@each_kind
def test_eager_and_jitted_callers_get_the_same_integers(weights, quantizer):
    def inside_a_larger_program(w):
        used_elsewhere = jnp.tanh(w).sum()
        return quantizer.quantize(w), used_elsewhere

    eager = quantizer.quantize(weights)
    jitted, _ = jax.jit(inside_a_larger_program)(weights)
    np.testing.assert_array_equal(jitted.codes, eager.codes)
    np.testing.assert_allclose(jitted.scale, eager.scale, rtol=1e-6)
    if eager.zero_point is not None:
        np.testing.assert_array_equal(jitted.zero_point, eager.zero_point)


@pytest.mark.parametrize("quantizer", FITTED, ids=repr)
def test_scaling_by_a_power_of_two_scales_the_scale_alone(weights, quantizer):
    one = quantizer.quantize(weights)
    for factor in (2.0**-90, 2.0**-20, 2.0**100):  # squares of the outer two leave float32
        other = quantizer.quantize(weights * np.float32(factor))
        np.testing.assert_array_equal(other.codes, one.codes)
        np.testing.assert_array_equal(other.scale, np.asarray(one.scale) * factor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantizer", [Binary(), KINDS[-1]], ids=repr)
def test_half_precision_is_quantized_in_float32_and_comes_back(weights, quantizer, dtype):
    half = jnp.asarray(weights, dtype)
    quantized = quantizer.quantize(half)
    single = quantizer.quantize(half.astype(jnp.float32))
    np.testing.assert_array_equal(quantized.codes, single.codes)
    assert quantized.scale.dtype == jnp.float32
    assert quantized.dequantize().dtype == dtype
    np.testing.assert_array_equal(quantized.dequantize(), single.dequantize().astype(dtype))


def test_float64_has_scales_in_float64(rng):
    w = rng.normal(size=(64, 5))
    with jax.enable_x64(True):
        for quantizer in (Binary(), Ternary(), Uniform(bits=4, scale="absmax")):
            quantized = quantizer.quantize(w)
            assert quantized.scale.dtype == quantized.dequantize().dtype == jnp.float64
            np.testing.assert_allclose(quantized.dequantize(), values(quantized), rtol=1e-15)
        scale = np.asarray(Binary().quantize(w).scale)
    np.testing.assert_allclose(scale, np.abs(w).mean(0, keepdims=True), rtol=1e-14)


@pytest.mark.parametrize("quantizer", [Ternary(), Uniform(bits=4, symmetric=False)], ids=repr)
def test_runs_without_implicit_dtype_promotion(rng, quantizer, strict_dtypes):
    w = jnp.asarray(rng.normal(size=(8, 3)), jnp.bfloat16)
    assert quantizer.quantize(w).dequantize().dtype == jnp.bfloat16
    assert alpha_blend(w, quantizer, 0.5).dtype == jnp.bfloat16


# Which weights share a scale


@pytest.mark.parametrize("quantizer", [*KINDS[:1], *KINDS[2:6]], ids=repr)
def test_per_channel_is_per_tensor_vmapped_over_the_channels(weights, quantizer):
    per_tensor = dataclasses.replace(quantizer, axis=None)
    mapped = jax.vmap(per_tensor.quantize, in_axes=1, out_axes=1)(weights)
    assert_same_fit(quantizer.quantize(weights), mapped, weights)


LAYOUTS = [  # shape of the weight, which weights share a scale, shape of the scale
    ((5, 12), {"axis": 0}, (5, 1)),
    ((6, 3, 2, 2), {"axis": 0}, (6, 1, 1, 1)),  # channels first
    ((3, 2, 4, 6), {}, (1, 1, 1, 6)),  # a convolution, channels last
    ((6, 3, 4), {"axis": (1, 2)}, (1, 3, 4)),  # an attention kernel: features, heads, head size
    ((6, 3, 4), {"axis": [-1, -3]}, (6, 1, 4)),
    ((12, 5), {"group_size": 4}, (3, 5)),
    ((2, 2, 12, 5), {"group_size": 6}, (1, 1, 2, 5)),
    ((5, 12), {"axis": 0, "group_size": 3, "group_axis": 1}, (5, 4)),
    ((12, 5), {"axis": None, "group_size": 4, "group_axis": 0}, (3, 1)),
    ((4, 6, 5), {"group_size": 3, "group_axis": (0, 1)}, (4, 2, 5)),  # an attention output, parts
    ((4, 6, 5), {"group_size": 12, "group_axis": (0, 1)}, (2, 1, 5)),  # of a head, two heads
    ((4, 6, 5), {"group_size": 24, "group_axis": [-3, -2]}, (1, 1, 5)),
    ((5, 4, 6), {"axis": 0, "group_size": 2, "group_axis": (1, -1)}, (5, 4, 3)),
    ((2, 3, 4, 5), {"group_size": 12, "group_axis": (0, 1, 2)}, (2, 1, 1, 5)),
    ((2, 2, 3, 5), {"group_size": 6, "group_axis": (-4, -3, -2)}, (2, 1, 1, 5)),
    ((7, 1, 5), {"group_size": 7, "group_axis": (0, 1)}, (1, 1, 5)),
    ((), {"axis": None}, ()),
    ((7,), {}, (7,)),  # a scale for each weight: a vector by its last axis,
    ((12, 5), {"group_size": 1}, (12, 5)),  # groups of one,
    ((3, 4), {"axis": (0, 1)}, (3, 4)),  # all axes
]


def blocks_of(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where the weights of each scale stand, in the order of the scales."""
    sizes = [size // count for size, count in zip(shape, scale_shape, strict=True)]
    return [
        tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, sizes, strict=True))
        for index in np.ndindex(scale_shape)
    ]


@pytest.mark.parametrize(("shape", "sharing", "scale_shape"), LAYOUTS)
def test_each_block_spans_its_own_range(rng, shape, sharing, scale_shape):
    quantizer = Uniform(bits=4, symmetric=False, scale="absmax", **sharing)
    w = rng.normal(size=shape).astype(np.float32)
    quantized = quantizer.quantize(w)
    assert quantized.scale.shape == quantizer.scale_shape(shape) == scale_shape
    assert quantized.zero_point.shape == scale_shape
    np.testing.assert_array_equal(quantized.dequantize(), values(quantized).astype(np.float32))
    scales, zero_points = np.ravel(quantized.scale), np.ravel(quantized.zero_point)

    for i, block in enumerate(blocks_of(shape, scale_shape)):
        exact = w[block].astype(np.float64)
        scale = (max(exact.max(), 0) - min(exact.min(), 0)) / 15
        below = -min(exact.min(), 0) / scale
        np.testing.assert_allclose(scales[i], scale, rtol=1e-6)
        if clear(below):
            assert zero_points[i] == np.round(below) - 8
        codes = np.clip(np.round(exact / scale) + zero_points[i], -8, 7)
        at = clear(exact / scale)
        np.testing.assert_array_equal(np.asarray(quantized.codes)[block][at], codes[at])


@pytest.mark.parametrize(
    ("quantizer", "shape"),
    [
        (Binary(group_size=4), (12, 5)),
        (Binary(), (7,)),
        (Ternary(axis=(1, 2)), (6, 3, 4)),
        (Ternary(axis=0, group_size=3, group_axis=2), (4, 2, 6)),
        (Ternary(group_size=1), (4, 3)),
        (Ternary(group_size=24, group_axis=(0, 1)), (6, 8, 3)),
        (Uniform(bits=4, group_size=32), (64, 5)),
        (Uniform(bits=4), (7,)),
    ],
    ids=repr,
)
def test_blocks_are_quantized_as_rows_of_a_matrix_would_be(rng, quantizer, shape):
    w = rng.normal(size=shape).astype(np.float32)
    quantized = quantizer.quantize(w)
    blocks = blocks_of(shape, quantizer.scale_shape(shape))
    assert len(blocks) == quantized.scale.size

    def by_rows(x) -> np.ndarray:
        return np.stack([np.asarray(x)[block].ravel() for block in blocks])

    plain = dataclasses.replace(quantizer, axis=0, group_size=None)
    in_rows = Quantized(
        by_rows(quantized.codes),
        np.reshape(quantized.scale, (-1, 1)),
        None if quantized.zero_point is None else np.reshape(quantized.zero_point, (-1, 1)),
        quantized.bits,
        quantized.dtype,
    )
    assert_same_fit(in_rows, plain.quantize(by_rows(w)), by_rows(w))
    np.testing.assert_array_equal(quantized.dequantize(), values(quantized).astype(np.float32))


def test_several_group_axes_are_one_that_holds_all_their_weights(rng):
    """As for a weight whose axes were flattened before, whatever the size of a group."""
    w = rng.normal(size=(8, 16, 6)).astype(np.float32)  # heads, head size, features
    for size in (1, 2, 8, 16, 32, 64, 128):
        quantizer = Uniform(bits=4, scale="absmax", group_size=size, group_axis=(0, 1))
        quantized = quantizer.quantize(w)
        flat = Uniform(bits=4, scale="absmax", group_size=size).quantize(w.reshape(128, 6))
        np.testing.assert_array_equal(quantized.codes, np.reshape(flat.codes, w.shape))
        np.testing.assert_array_equal(
            np.reshape(quantized.scale, (-1, 6)), np.reshape(flat.scale, (-1, 6))
        )
        np.testing.assert_array_equal(quantized.dequantize(), flat.dequantize().reshape(w.shape))


@hypothesis.given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), size=st.integers(1, 60)
)
def test_groups_of_several_axes_are_found_wherever_there_are_some(sizes, size):
    """Against a search through all numbers of groups that divide the sizes."""
    ids = np.arange(np.prod(sizes)) // size
    wanted = None
    for counts in itertools.product(*([n for n in range(1, s + 1) if s % n == 0] for s in sizes)):
        blocks = np.arange(np.prod(counts)).reshape(counts)
        for axis, (whole, count) in enumerate(zip(sizes, counts, strict=True)):
            blocks = np.repeat(blocks, whole // count, axis)
        if np.array_equal(blocks.ravel(), ids) and np.prod(counts) * size == np.prod(sizes):
            wanted = list(counts)
    assert scale_fits.group_counts(sizes, size) == wanted


# Extremes

EXTREMES = {  # a channel each
    "zeros": lambda rng, n: np.zeros(n),
    "negative zeros": lambda rng, n: np.full(n, -0.0),
    "equal": lambda rng, n: np.full(n, rng.normal()),
    "equal and negative": lambda rng, n: np.full(n, -1.5),
    "subnormal": lambda rng, n: rng.normal(size=n) * 1e-40,
    "smallest": lambda rng, n: np.where(rng.random(n) < 0.5, 1e-45, -1e-45),
    "smallest normal": lambda rng, n: rng.normal(size=n) * 2e-38,
    "1e-30": lambda rng, n: rng.normal(size=n) * 1e-30,
    "1e30": lambda rng, n: np.where(rng.random(n) < 0.5, 1e30, -1e30),
    "all of 1e30": lambda rng, n: np.full(n, 1e30),
    "1e30 and 1": lambda rng, n: np.where(np.arange(n) == 3, 1e30, rng.normal(size=n)),
    "1e30 and subnormal": lambda rng, n: np.where(np.arange(n) % 2, -1e30, 1e-40),
    "one weight": lambda rng, n: np.where(np.arange(n) == 0, 2.0, 0.0),
}
LARGEST = {
    "3e38": lambda rng, n: np.where(rng.random(n) < 0.5, 3e38, -3e38),
    "largest": lambda rng, n: np.full(n, np.finfo(np.float32).max),
}


def channels(kinds, rng: np.random.Generator) -> np.ndarray:
    """A channel each, in the shape that the fits are compiled for already."""
    w = np.stack([make(rng, SHAPE[0]) for make in kinds.values()], axis=1)
    return np.pad(w, [(0, 0), (0, SHAPE[1] - len(kinds))]).astype(np.float32)


def assert_sound(w: np.ndarray, quantized: Quantized, quantizer) -> np.ndarray:
    """All finite, codes in range, and no weight further off than the channel is wide."""
    lowest, highest = code_range(quantizer)
    codes = np.asarray(quantized.codes)
    dequantized = np.asarray(quantized.dequantize())
    assert np.isfinite(quantized.scale).all()
    assert np.isfinite(dequantized).all()
    assert lowest <= codes.min()
    assert codes.max() <= highest
    if quantized.zero_point is not None:
        assert lowest <= np.min(quantized.zero_point)
        assert np.max(quantized.zero_point) <= highest
    if getattr(quantizer, "fixed_scale", None) is None:
        widest = np.abs(w.astype(np.float64)).max(0)
        # Allow what is below the normal float32 numbers to vanish; 1e-6 is rounding.
        assert (np.abs(w.astype(np.float64) - dequantized) <= widest * (2 + 1e-6) + 1e-35).all()
    return dequantized


@each_kind
def test_extreme_channels_are_finite_and_as_good_as_ever(rng, quantizer):
    w = channels(EXTREMES, rng)
    dequantized = assert_sound(w, quantizer.quantize(w), quantizer)
    if quantizer in FITTED:
        found = dict(zip(EXTREMES, dequantized.T, strict=False))
        given = dict(zip(EXTREMES, w.T, strict=False))
        for name in ("zeros", "negative zeros"):
            np.testing.assert_array_equal(found[name], 0.0)
        for name in ("equal", "equal and negative", "all of 1e30"):  # a level lies on the value
            np.testing.assert_allclose(found[name], given[name], rtol=1e-6)
        if getattr(quantizer, "symmetric", True):
            np.testing.assert_allclose(found["1e30"], given["1e30"], rtol=1e-6)
        if not isinstance(quantizer, Binary) and quantizer != Ternary(scale="absmean"):
            np.testing.assert_allclose(found["one weight"], given["one weight"], rtol=1e-6)
        if quantizer.bits == 8:
            np.testing.assert_allclose(found["1e-30"], given["1e-30"], atol=6e-32)


@each_kind
def test_the_largest_floats(rng, quantizer):
    w = channels(LARGEST, rng)
    dequantized = assert_sound(w, quantizer.quantize(w), quantizer)
    if quantizer in FITTED and getattr(quantizer, "symmetric", True):
        np.testing.assert_allclose(dequantized, w, rtol=1e-5)


ALL_KINDS = [*FITTED, *(LeastSquaresBinary(bits=bits) for bits in (1, 2, 3, 4))]
ALL_KINDS += [Uniform(bits=4, symmetric=False)]


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        *itertools.product(ALL_KINDS, ["float32"]),
        *itertools.product(ALL_KINDS[5:7] + ALL_KINDS[-2:], ["float16"]),
        (ALL_KINDS[-1], "bfloat16"),
    ],
    ids=repr,
)
def test_no_level_overflows_the_dtype_of_the_weights(rng, quantizer, dtype):
    """Weights at both ends of the dtype, near them, and far below; all levels, used or not."""
    largest = np.asarray(jnp.finfo(dtype).max)
    columns = [np.where(rng.random(SHAPE[0]) < share, -1, 1) for share in (0, 0.5, 0.9, 1)]
    columns += [np.where(rng.random(SHAPE[0]) < 0.25, 0.03, column) for column in columns]
    columns += [rng.uniform(-1, 1, SHAPE[0]) for _ in range(4)]
    shares = np.stack([*columns, *(column / 2 for column in columns)], axis=1)
    shares = np.pad(shares, [(0, 0), (0, SHAPE[1] - shares.shape[1])])
    w = (shares * largest.astype(np.float64)).astype(largest.dtype)
    assert np.isfinite(w).all()
    quantized = quantizer.quantize(w)
    for found in (quantized.levels(), quantized.dequantize()):
        assert np.isfinite(np.asarray(found).astype(w.dtype)).all()
    # As near as without such an end: the widest gap between levels is that of one bit.
    off = np.abs(np.asarray(quantized.dequantize(), np.float64) - w.astype(np.float64))
    used = np.abs(shares).max(0) > 0
    assert (off[:, used] <= 1.3 * float(largest) * np.abs(shares[:, used]).max(0)).all()
    if quantizer.bits == 8:
        # In steps of 2 / 255: half of one is rounding. A fit cuts off no more than all 256 weights
        # lose to rounding under absmax, a twelfth of a squared step each.
        steps = np.sqrt(SHAPE[0] / 12) + 0.5
        assert (off[:, used] <= steps * 2 / 255 * float(largest)).all()


def test_a_channel_without_a_scale_is_zeros():
    """Scale 1 where there is a code for zero, else 0: on every device, at any width."""
    w = np.zeros(SHAPE, np.float32)
    w[:, 0], w[:, 1], w[::2, 2] = 1e-40, -1e-45, 1e-38
    for quantizer in ALL_KINDS:
        quantized = quantizer.quantize(w)
        np.testing.assert_array_equal(quantized.dequantize(), 0.0)
        no_zero = isinstance(quantizer, Binary | LeastSquaresBinary)
        np.testing.assert_array_equal(quantized.scale, 0.0 if no_zero else 1.0)


def test_small_float64_weights_are_no_zeros(rng):
    w, tiny = rng.normal(size=(64, 5)), 2.0**-990
    with jax.enable_x64(True):
        for quantizer in (Binary(), Ternary(), Uniform(bits=8)):
            one, small = quantizer.quantize(w), quantizer.quantize(w * tiny)
            np.testing.assert_array_equal(small.codes, one.codes)
            np.testing.assert_allclose(small.scale, one.scale * tiny, rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "quantizer",
    [
        *(Binary(), Binary(fixed_scale=1.0), Ternary(), Ternary(scale="absmean")),
        *(
            Uniform(bits=3, symmetric=symmetric, scale=scale)
            for symmetric in (True, False)
            for scale in ("absmax", "least_squares")
        ),
        *(LeastSquaresBinary(bits=bits) for bits in (1, 2, 3)),
    ],
    ids=repr,
)
def test_a_weight_that_is_no_finite_number_makes_its_scale_nan(rng, quantizer, value):
    w = rng.normal(size=(4, 3)).astype(np.float32)
    w[2, 1] = value
    quantized = quantizer.quantize(w)
    scale = np.asarray(quantized.scale).reshape(1, 3, -1)
    assert np.all(np.isnan(scale[:, 1]))
    assert np.all(np.isfinite(scale[:, ::2]))
    assert np.all(np.isnan(quantized.dequantize()) == [False, True, False])


def test_signs_of_the_largest_numbers_have_a_fixed_scale():
    """Though the sum of so many may round to infinity, which no weight is."""
    w = np.full((7, 3), np.finfo(np.float32).max)
    np.testing.assert_array_equal(Binary(fixed_scale=2.0).quantize(w).scale, 2.0)


def test_a_fixed_scale_may_be_a_scalar_of_any_kind():
    for scale in (1, np.float32(1), np.asarray(1), jnp.float32(1)):
        assert hash(Binary(fixed_scale=scale)) == hash(Binary(fixed_scale=1.0))
        assert Binary(fixed_scale=scale) == Binary(fixed_scale=1.0)
    with pytest.raises(ValueError, match="fixed_scale must be a number"):  # not known when traced
        jax.jit(lambda scale: Binary(fixed_scale=scale).quantize(W).scale)(1.0)


@pytest.mark.parametrize(
    ("dtype", "fixed"),
    [
        ("float16", 1e30),
        ("float16", 1e-9),
        ("bfloat16", 1e39),
        ("float32", 1e39),
        ("float32", 1e-40),
    ],
)
def test_a_fixed_scale_that_the_weights_cannot_hold_is_refused(dtype, fixed):
    w = jnp.ones((4, 3), dtype)
    message = f"{dtype} weights take a fixed_scale from .* not {re.escape(str(fixed))}"
    with pytest.raises(ValueError, match=message):
        Binary(fixed_scale=fixed).quantize(w)
    rules = Rules([("layer/w", Binary(fixed_scale=fixed))])
    for use in (quantize, describe):
        with pytest.raises(ValueError, match=f"parameter layer/w: .*{message}"):
            use({"layer": {"w": w}}, rules)
    assert Binary(fixed_scale=6e4).quantize(jnp.ones((4, 3), "float16")).dequantize().max() < np.inf


@pytest.mark.parametrize("quantizer", FITTED, ids=repr)
def test_a_tensor_of_zeros_quantizes_to_zeros(quantizer):
    quantized = quantizer.quantize(np.zeros(SHAPE, np.float32))
    np.testing.assert_array_equal(quantized.dequantize(), np.zeros(SHAPE))
    if not isinstance(quantizer, Binary):
        np.testing.assert_array_equal(quantized.codes, 0)
        np.testing.assert_array_equal(quantized.scale, 1.0)


EXTREME_FLOATS = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1.0, -1.0, 1.5, 1e30, -1e30]),
    st.floats(-1, 1, width=32),
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    drawn=hnp.arrays(np.float32, (8, 3), elements=EXTREME_FLOATS, fill=st.nothing()),
    rest=st.sampled_from([0.0, 1.0]),
    quantizer=st.sampled_from(KINDS),
)
def test_any_weights(drawn, rest, quantizer):
    w = np.full(SHAPE, rest, np.float32)  # a shape that is compiled already
    w[: drawn.shape[0], : drawn.shape[1]] = drawn
    quantized = quantizer.quantize(w)
    dequantized = assert_sound(w, quantized, quantizer)
    np.testing.assert_array_equal(dequantized, flushed(values(quantized).astype(np.float32)))


def flushed(x: np.ndarray) -> np.ndarray:
    """With subnormal numbers replaced by zeros, as XLA's arithmetic does."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, 0, x)


@st.composite
def layouts(draw):
    """A shape, the channel axes, and perhaps groups along another axis."""
    shape = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4).map(tuple))
    axes = draw(st.sets(st.integers(0, len(shape) - 1)))
    signed = tuple(axis - len(shape) * draw(st.booleans()) for axis in sorted(axes))
    sharing = {"axis": None if not signed and draw(st.booleans()) else signed}
    rest = sorted(set(range(len(shape))) - axes)
    if rest and draw(st.booleans()):
        group_axis = draw(st.sampled_from(rest))
        sharing["group_axis"] = group_axis
        sharing["group_size"] = draw(
            st.sampled_from([n for n in (1, 2, 4) if shape[group_axis] % n == 0])
        )
    return shape, sharing


@hypothesis.settings(max_examples=10)
@hypothesis.given(layout=layouts(), bits=st.integers(2, 8), seed=st.integers(0, 2**32 - 1))
def test_any_layout(layout, bits, seed):
    shape, sharing = layout
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    quantizer = Uniform(bits=bits, scale="absmax", **sharing)
    quantized = quantizer.quantize(w)
    assert quantized.scale.shape == quantizer.scale_shape(shape)
    for i, block in enumerate(blocks_of(shape, quantized.scale.shape)):
        scale = np.abs(w[block]).max().astype(np.float64) / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(np.ravel(quantized.scale)[i], scale, rtol=1e-6)
    np.testing.assert_array_equal(quantized.dequantize(), values(quantized).astype(np.float32))
    off = np.abs(w - values(quantized))
    assert (off <= values(dataclasses.replace(quantized, codes=np.ones(shape))) * 0.501).all()


# Quantized is a tree, quantizers are values


def test_quantized_is_a_tree_with_static_width_and_dtype(rng):
    w = rng.normal(size=(3, 12, 5)).astype(np.float32)
    quantizer = Uniform(bits=4, symmetric=False, scale="absmax")
    quantized = quantizer.quantize(w[0])
    leaves, structure = jax.tree.flatten(quantized)
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32, jnp.int8]
    assert jax.tree.structure(Uniform(bits=5, symmetric=False, scale="absmax").quantize(w[0])) != (
        structure
    )
    # The arrays alone are stored; the structure restores the rest.
    stored = [pickle.loads(pickle.dumps(np.asarray(leaf))) for leaf in leaves]
    restored = jax.tree.unflatten(structure, stored)
    assert isinstance(restored, Quantized)
    assert (restored.bits, restored.dtype) == (4, "float32")
    np.testing.assert_array_equal(restored.codes, quantized.codes)

    wanted = quantized.dequantize()
    np.testing.assert_array_equal(jax.jit(Quantized.dequantize)(quantized), wanted)
    twice = jax.tree.map(lambda a: np.stack([a, a]), quantized)
    np.testing.assert_array_equal(jax.vmap(Quantized.dequantize)(twice), np.stack([wanted, wanted]))
    stacked = jax.vmap(quantizer.quantize)(w)  # three models at once
    assert stacked.codes.shape == w.shape
    assert stacked.scale.shape == (3, 1, 5)
    np.testing.assert_array_equal(stacked.codes[0], quantized.codes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized.bits = 3
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(quantized)]
    assert paths == [".codes", ".scale", ".zero_point"]
    assert len(jax.tree.leaves(Binary().quantize(w))) == 2  # no zero point, no leaf


def test_quantizers_are_hashable_by_value_and_static_arguments():
    same = [
        (Binary(), Binary(fixed_scale=None)),
        (Ternary(axis=(0, 1)), Ternary(axis=[0, 1])),
        (Binary(group_size=6, group_axis=(0, 1)), Binary(group_size=6, group_axis=[0, 1])),
        (Uniform(bits=4), Uniform(bits=4, symmetric=True, scale="least_squares", axis=-1)),
    ]
    for one, other in same:
        assert one == other
        assert hash(one) == hash(other)
        assert pickle.loads(pickle.dumps(one)) == one
    different = {
        *(Binary(), Binary(fixed_scale=1.0), Binary(axis=0), Ternary(), Uniform(bits=2)),
        Ternary(scale="absmean"),
        *(Uniform(bits=4), Uniform(bits=4, symmetric=False), Uniform(bits=4, scale="absmax")),
        *(Uniform(bits=4, group_size=2), Uniform(bits=4, group_size=2, group_axis=0)),
    }
    assert len(different) == 11

    traced = []

    def quantized_sum(w, quantizer):
        traced.append(quantizer)
        return quantizer.quantize(w).dequantize().sum()

    jitted = jax.jit(quantized_sum, static_argnums=1)
    for quantizer in (Binary(), Binary(), Binary(axis=None), Binary(axis=-1)):
        jitted(np.ones((4, 2), np.float32), quantizer)
    assert traced == [Binary(), Binary(axis=None)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Binary().axis = 0


# Errors

W = np.ones((4, 6), np.float32)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: Uniform(bits=1), ValueError, ["2 to 8 bits", "bits=1", "Binary()"]),
        (lambda: Uniform(bits=9), ValueError, ["2 to 8 bits", "bits=9"]),
        (lambda: Uniform(bits=0), ValueError, ["2 to 8 bits", "bits=0"]),
        (lambda: Uniform(bits=-4), ValueError, ["2 to 8 bits", "bits=-4"]),
        (lambda: Uniform(bits=3.5), ValueError, ["2 to 8 bits", "bits=3.5"]),
        (lambda: Uniform(bits="4"), ValueError, ["2 to 8 bits", "bits='4'"]),
        (lambda: Uniform(bits=4.0), ValueError, ["2 to 8 bits", "bits=4.0"]),
        (lambda: Binary(fixed_scale=float("nan")), ValueError, ["fixed_scale=nan", "positive"]),
        (lambda: Binary(fixed_scale=float("inf")), ValueError, ["fixed_scale=inf", "finite"]),
        (lambda: Binary(fixed_scale=-1.0), ValueError, ["fixed_scale=-1.0", "positive"]),
        (lambda: Binary(fixed_scale=0), ValueError, ["fixed_scale=0", "positive"]),
        (lambda: Binary(fixed_scale="1"), ValueError, ["fixed_scale='1'", "a number"]),
        (lambda: Binary(fixed_scale=np.ones(2)), ValueError, ["fixed_scale", "a number"]),
        (lambda: Binary(group_size=2.0), ValueError, ["group_size", "integer", "not 2.0"]),
        (lambda: Binary(axis=1.0), ValueError, ["axis=1.0", "integers"]),
        (lambda: Binary(axis=(0, "1")), ValueError, ["axis=(0, '1')", "integers"]),
        (lambda: Binary(group_axis=0.0), ValueError, ["group_axis=0.0", "integers"]),
        (
            lambda: Uniform(bits=4, scale="max"),
            ValueError,
            ["least_squares", "absmax", "scale='max'"],
        ),
        (
            lambda: Ternary(scale="absmax"),
            ValueError,
            ["Ternary", "'least_squares' or 'absmean'", "scale='absmax'"],
        ),
        (lambda: Binary(group_size=0), ValueError, ["group_size", "at least 1", "not 0"]),
        (lambda: Binary(axis=2).quantize(W), ValueError, ["axis 2", "(4, 6)", "axis=None"]),
        (lambda: Binary(axis=(0, -3)).quantize(W), ValueError, ["axis -3", "(4, 6)", "axis=None"]),
        (lambda: Binary().quantize(np.float32(1)), ValueError, ["axis -1", "()", "axis=None"]),
        (lambda: Ternary(group_size=3).quantize(W), ValueError, ["groups of 3", "has size 4"]),
        (
            lambda: Ternary(group_size=3, group_axis=1).quantize(W),
            ValueError,
            ["axis 1", "channel axis already", "Give a group_axis"],
        ),
        (
            lambda: Ternary(group_size=3, group_axis=5).quantize(W),
            ValueError,
            ["axis 5", "(4, 6)"],
        ),
        (
            lambda: Uniform(bits=4, axis=None, group_size=4).quantize(np.ones(8)),
            ValueError,
            ["group_axis=-2", "(8,)", "Give group_axis=-1", "group_size=None"],
        ),
        (
            lambda: Ternary(group_size=4).quantize(np.ones(8)),
            ValueError,
            ["group_axis=-2", "(8,)", "Give group_size=None for no groups"],
        ),
        (
            lambda: Ternary(group_size=4, group_axis=5).quantize(np.ones((4, 4, 3))),
            ValueError,
            ["group_axis=5", "(4, 4, 3)", "group_axis=-3 or -2"],
        ),
        (lambda: Ternary(group_axis=(0, "1")), ValueError, ["group_axis=(0, '1')", "integers"]),
        (lambda: Ternary(group_axis=()), ValueError, ["group_axis=()", "integers"]),
        (
            lambda: Ternary(group_size=8, group_axis=(0, 1)).quantize(np.ones((4, 6, 3))),
            ValueError,
            ["axis (0, 1)", "(4, 6, 3)", "groups of 8", "sizes 4 x 6", "parts of the last"],
        ),
        (
            lambda: Ternary(group_size=48, group_axis=(0, 1)).quantize(np.ones((4, 6, 3))),
            ValueError,
            ["groups of 48", "sizes 4 x 6"],
        ),
        (
            lambda: Ternary(group_size=6, group_axis=(1, 2)).quantize(np.ones((4, 6, 3))),
            ValueError,
            ["one of them is a channel axis already"],
        ),
        (
            lambda: Ternary(axis=1, group_size=6, group_axis=(0, 2)).quantize(np.ones((4, 6, 3))),
            ValueError,
            ["(0, 2)", "not side by side"],
        ),
        (
            lambda: Ternary(group_size=6, group_axis=(1, 0)).quantize(np.ones((4, 6, 3))),
            ValueError,
            ["(1, 0)", "rising order"],
        ),
        (
            lambda: Ternary(group_size=6, group_axis=(0, 4)).quantize(np.ones((4, 6, 3))),
            ValueError,
            ["axis 4", "(4, 6, 3)"],
        ),
        (
            lambda: Uniform(bits=4).quantize(np.ones((0, 3), np.float32)),
            ValueError,
            ["empty", "(0, 3)"],
        ),
        (
            lambda: Uniform(bits=4).quantize(np.ones((2, 3), np.int32)),
            TypeError,
            ["Uniform(bits=4", "floating-point", "int32", "(2, 3)", "None"],
        ),
        (lambda: Binary().quantize(W > 0), TypeError, ["floating-point", "bool"]),
        (lambda: Binary().quantize(W.astype(complex)), TypeError, ["floating-point", "complex"]),
    ],
)
def test_errors_name_the_culprit_and_the_fix(make, kind, words):
    with pytest.raises(kind) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_bad_layouts_are_refused_before_anything_is_compiled():
    with pytest.raises(ValueError, match="axis 2"):
        jax.eval_shape(Binary(axis=2).quantize, jax.ShapeDtypeStruct((4, 6), jnp.float32))
    with pytest.raises(ValueError, match="groups of 5"):
        Binary(group_size=5).scale_shape((4, 6))
