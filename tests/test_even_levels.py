"""Least squares of even levels, and thresholds, against the least there is, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax import LeastSquaresBinary, Ternary, Uniform
from benchmarks.measuring.least_errors import drawn, even_levels, two_groups


def error_of(w: np.ndarray, quantized) -> np.ndarray:
    zero_point = 0 if quantized.zero_point is None else np.asarray(quantized.zero_point, np.float64)
    codes, scale = np.asarray(quantized.codes, np.float64), np.asarray(quantized.scale, np.float64)
    return np.square(w.astype(np.float64) - (codes - zero_point) * scale).sum(0)


def assert_near(found: np.ndarray, least: np.ndarray, bound: float, w: np.ndarray) -> None:
    """Errors below a millionth of the squares are none."""
    squares = np.square(w.astype(np.float64)).sum(0)
    ratio = np.where(found <= 1e-6 * squares, 1, found / np.maximum(least, 1e-12 * squares))
    assert ratio.max() <= bound


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [9, 27, 100, 600, pytest.param(5000, marks=pytest.mark.long)])
def test_symmetric_levels_lose_hardly_more_than_the_least(rng, bits, count):
    w = drawn(rng, count)
    found = error_of(w, Uniform(bits=bits).quantize(w))
    assert_near(found, even_levels(w, bits, True), 1.05 if bits <= 4 else 1.02, w)


# The larger the block, the more a good window is worth: those of 4 bits were found wanting first.
@pytest.mark.parametrize(
    ("bits", "count"),
    [
        *((2, 9), (2, 600), (3, 27), (3, 300), (3, 3000), (4, 9), (4, 100), (4, 3000)),
        pytest.param(4, 12000, marks=pytest.mark.long),
        pytest.param(5, 100, marks=pytest.mark.long),
        pytest.param(5, 3000, marks=pytest.mark.long),
        pytest.param(6, 1000, marks=pytest.mark.long),
    ],
)
def test_levels_with_a_zero_point_lose_hardly_more_than_the_least_of_all_windows(rng, bits, count):
    w = drawn(rng, count)
    found = error_of(w, Uniform(bits=bits, symmetric=False).quantize(w))
    assert_near(found, even_levels(w, bits, False), 1.05 if bits <= 4 else 1.02, w)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_never_above_absmax(rng, count, symmetric):
    w = drawn(rng, max(count, 2))[:count]
    for bits in (2, 4, 8):
        fitted, widest = (
            error_of(w, Uniform(bits=bits, symmetric=symmetric, scale=scale).quantize(w))
            for scale in ("least_squares", "absmax")
        )
        assert (fitted <= widest * (1 + 1e-5) + 1e-12 * np.square(w).sum(0)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_weights_with_a_zero_point_get_absmax(rng, bits):
    """Whose levels span them: with all levels on one side of 0 they lost up to 20 times as much."""
    w = rng.uniform(-3.3e38, 3.3e38, size=(40, 4)).astype(np.float32)
    fitted, widest = (
        Uniform(bits=bits, symmetric=False, scale=scale).quantize(w)
        for scale in ("least_squares", "absmax")
    )
    np.testing.assert_array_equal(fitted.zero_point, widest.zero_point)
    np.testing.assert_array_equal(fitted.codes, widest.codes)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_bfloat16_weights_are_fitted_as_well(rng, bits):
    w = np.asarray(jnp.asarray(drawn(rng, 100), jnp.bfloat16), np.float32)
    found = error_of(w, Uniform(bits=bits).quantize(jnp.asarray(w, jnp.bfloat16)))
    assert (found <= (1.05 if bits <= 4 else 1.02) * even_levels(w, bits, True) + 1e-9).all()


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_values_on_even_levels_are_found_again(rng, bits):
    """Also where the outermost levels are not in use, and levels of absmax lie elsewhere."""
    half = 2 ** (bits - 1) - 1
    codes = rng.integers(-half, half + 1, size=(40, 24))
    codes = codes * (np.abs(codes) <= rng.integers(half // 2 + 1, half + 1, size=24))
    w = (codes * rng.uniform(0.01, 0.1, size=24)).astype(np.float32)
    quantized = Uniform(bits=bits).quantize(w)
    np.testing.assert_allclose(quantized.dequantize(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize(("bits", "count"), [(3, 300), (4, 256), (5, 2000), (8, 100), (8, 300)])
def test_integers_are_found_again_whatever_the_largest(rng, bits, count, symmetric):
    """Of many weights, the scale of which may be nearly twice that of absmax."""
    steps = 2**bits - (2 if symmetric else 1)
    spans = (
        rng.integers(1, steps // 2 + 1, size=24) * 2 if symmetric else rng.integers(1, steps, 24)
    )
    lowest = -spans // 2 if symmetric else -rng.integers(0, spans + 1)
    w = rng.integers(lowest, lowest + spans + 1, size=(count, 24)).astype(np.float32)
    found = error_of(w, Uniform(bits=bits, symmetric=symmetric).quantize(w))
    assert (found <= 1e-6 * np.square(w, dtype=np.float64).sum(0)).all()


@pytest.mark.parametrize(
    ("bits", "count", "symmetric"),
    [
        *((3, 256, True), (4, 256, True), (6, 256, True), (3, 256, False)),
        pytest.param(3, 2000, True, marks=pytest.mark.long),
    ],
)
def test_levels_of_heavy_tails_mostly_lose_hardly_more_than_the_least(rng, bits, count, symmetric):
    """Of many weights it is the few of the tail whose errors tell one scale from another."""
    size = (count, 80)
    heavy = [rng.standard_cauchy(size), rng.pareto(1.2, size)]
    w = np.concatenate(heavy, axis=1, dtype=np.float32, casting="same_kind")
    found = error_of(w, Uniform(bits=bits, symmetric=symmetric).quantize(w))
    ratio = found / np.maximum(even_levels(w, bits, symmetric), 1e-6 * np.square(w).sum(0))
    assert np.mean(ratio > (1.05 if bits <= 4 else 1.01)) <= 0.05
    # With a zero point one channel in 2,000 loses up to three times the least.
    assert np.mean(ratio > 1.7) <= (0 if symmetric else 0.02)


def test_levels_of_zeros_and_a_heap_mostly_lose_hardly_more_than_the_least(rng):
    size = (300, 40)
    w = (rng.normal(5, 1, size) * (rng.random(size) < 1 / 3)).astype(np.float32)
    found = error_of(w, Uniform(bits=4, symmetric=False).quantize(w))
    ratio = found / even_levels(w, 4, False)
    assert np.mean(ratio > 1.05) <= 0.1
    assert ratio.max() < 1.4


# Thresholds


@pytest.mark.parametrize("count", [1, 2, 9, 27, 100, 600, 3000])
def test_ternary_codes_are_those_of_a_search_through_all_thresholds(rng, count):
    w = drawn(rng, max(count, 2))[:count]
    falling = -np.sort(-np.abs(w.astype(np.float64)), axis=0)
    saved = np.cumsum(falling, axis=0) ** 2 / np.arange(1, count + 1)[:, None]
    codes = np.asarray(Ternary().quantize(w).codes)
    used = np.abs(codes).sum(0)
    np.testing.assert_array_equal(np.sign(w) * (codes != 0), codes)
    for channel, number in enumerate(used):
        best = saved[:, channel].max()
        if best == 0:
            assert number == 0
        elif number != saved[:, channel].argmax() + 1:  # float32 cannot tell the two apart
            assert saved[number - 1, channel] >= best * (1 - 1e-6)
        # The codes are those of the largest magnitudes.
        magnitudes = np.abs(w[:, channel])
        kept = codes[:, channel] != 0
        if 0 < number < count:
            assert magnitudes[kept].min() >= magnitudes[~kept].max()


@pytest.mark.parametrize("count", [2, 9, 100, 600])
def test_two_signs_are_those_of_a_search_through_all_groups(rng, count):
    w = drawn(rng, count)
    quantized = LeastSquaresBinary(bits=2).quantize(w)
    found = np.square(w - np.asarray(quantized.dequantize(), np.float64)).sum(0)
    least, squares = two_groups(w), np.square(w.astype(np.float64)).sum(0)
    # Of two groupings far apart whose errors are nearly the same, either may be taken.
    assert (found <= least * 1.01 + 1e-6 * squares).all()
    assert (found <= least * 1.00001 + 1e-6 * squares).mean() > 0.95


def test_a_group_of_zeros_has_the_level_zero(rng):
    """Whose mean is a difference of two sums, and may come out below."""
    for _ in range(5):
        w = rng.uniform(1, 3, size=(60, 28)).astype(np.float32)
        w[:6] = 0
        scales = np.asarray(LeastSquaresBinary(bits=2).quantize(w).scale)
        assert (scales[..., 0] >= scales[..., 1]).all()
        assert (scales[..., 1] >= 0).all()
