"""Least squares of even levels, and thresholds, against the best there is: enumerated in float64.

The error of a block changes its course where a weight lies half way between two levels. Between
such scales the codes stay, and the best scale for them is known: going through all of them finds
the least error exactly.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax import LeastSquaresBinary, Ternary, Uniform

CHANNELS = 4  # of each distribution


def drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """Normal, Laplace, flat, two heaps, an outlier, sparse, off zero, of one sign: side by side."""
    size = (count, CHANNELS)
    outlier, sparse = rng.normal(size=size), rng.normal(size=size) * (rng.random(size) < 0.2)
    outlier[0] = 10 * np.sign(outlier[0])
    sparse[:2] = rng.normal(size=(2, CHANNELS))
    kinds = [
        *(rng.normal(size=size), rng.laplace(size=size), rng.uniform(-1, 1, size)),
        np.sign(rng.normal(size=size)) + 0.1 * rng.normal(size=size),
        *(outlier, sparse, rng.normal(1, 1, size), rng.gamma(1.0, size=size)),
    ]
    return np.concatenate(kinds, axis=1, dtype=np.float32, casting="same_kind")


def least_error(w: np.ndarray, lowest: int, highest: int) -> float:
    """Of a block, over all scales."""
    crossings = []
    for side, levels in ((1, highest), (-1, -lowest)):
        magnitudes = (side * w.astype(np.float64))[side * w > 0]
        k = np.arange(levels)
        crossings.append(
            np.stack(
                np.broadcast_arrays(
                    magnitudes[:, None] / (k + 0.5), magnitudes[:, None], 2.0 * k + 1
                )
            ).reshape(3, -1)
        )
    scale, wq, qq = np.concatenate(crossings, axis=1)
    order = np.argsort(-scale)
    wq, qq = np.cumsum(wq[order]), np.cumsum(qq[order])
    return float(np.square(w.astype(np.float64)).sum() - np.max(wq**2 / qq, initial=0))


def least_errors(w: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    half = 2 ** (bits - 1) - 1
    windows = [(-half, half)] if symmetric else [(-z, 2**bits - 1 - z) for z in range(2**bits)]
    return np.array([min(least_error(channel, *window) for window in windows) for channel in w.T])


def error_of(w: np.ndarray, quantized) -> np.ndarray:
    zero_point = 0 if quantized.zero_point is None else np.asarray(quantized.zero_point, np.float64)
    codes, scale = np.asarray(quantized.codes, np.float64), np.asarray(quantized.scale, np.float64)
    return np.square(w.astype(np.float64) - (codes - zero_point) * scale).sum(0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [9, 27, 100, 600])
def test_symmetric_levels_lose_hardly_more_than_the_least(rng, bits, count):
    w = drawn(rng, count)
    found = error_of(w, Uniform(bits=bits).quantize(w))
    # float32 cannot tell errors below this.
    rounding = 1e-12 * np.square(w.astype(np.float64)).sum(0)
    ratio = (found + rounding) / (least_errors(w, bits, True) + rounding)
    assert ratio.max() <= (1.05 if bits <= 4 else 1.03)
    # At 7 and 8 bits a block in a thousand is above 1.01.
    assert (ratio > 1.01).sum() <= (ratio.size if bits <= 4 else 1 if bits >= 7 else 0)


@pytest.mark.parametrize(("bits", "count"), [(2, 9), (2, 600), (3, 27), (3, 300), (4, 9), (4, 100)])
def test_levels_with_a_zero_point_lose_hardly_more_than_the_least_of_all_windows(rng, bits, count):
    w = drawn(rng, count)
    found = error_of(w, Uniform(bits=bits, symmetric=False).quantize(w))
    rounding = 1e-12 * np.square(w.astype(np.float64)).sum(0)
    ratio = (found + rounding) / (least_errors(w, bits, False) + rounding)
    assert ratio.max() <= 1.05


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


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_bfloat16_weights_are_fitted_as_well(rng, bits):
    w = np.asarray(jnp.asarray(drawn(rng, 100), jnp.bfloat16), np.float32)
    found = error_of(w, Uniform(bits=bits).quantize(jnp.asarray(w, jnp.bfloat16)))
    assert (found <= (1.05 if bits <= 4 else 1.01) * least_errors(w, bits, True) + 1e-9).all()


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_values_on_even_levels_are_found_again(rng, bits):
    """Also where the outermost levels are not in use, and levels of absmax lie elsewhere."""
    half = 2 ** (bits - 1) - 1
    codes = rng.integers(-half, half + 1, size=(40, 24))
    codes = codes * (np.abs(codes) <= rng.integers(half // 2 + 1, half + 1, size=24))
    w = (codes * rng.uniform(0.01, 0.1, size=24)).astype(np.float32)
    quantized = Uniform(bits=bits).quantize(w)
    np.testing.assert_allclose(quantized.dequantize(), w, rtol=1e-5, atol=1e-6)


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
    rising = np.sort(np.abs(w.astype(np.float64)), axis=0)
    sums, squares = np.cumsum(rising, axis=0), np.square(rising).sum(0)
    k = np.arange(1, count)[:, None]
    saved = sums[:-1] ** 2 / k + (sums[-1] - sums[:-1]) ** 2 / (count - k)
    quantized = LeastSquaresBinary(bits=2).quantize(w)
    found = np.square(w - np.asarray(quantized.dequantize(), np.float64)).sum(0)
    # Of two groupings far apart whose errors are nearly the same, either may be taken.
    assert (found <= (squares - saved.max(0)) * 1.01 + 1e-6 * squares).all()
    assert (found <= (squares - saved.max(0)) * 1.00001 + 1e-6 * squares).mean() > 0.95


def test_a_group_of_zeros_has_the_level_zero(rng):
    """Whose mean is a difference of two sums, and may come out below."""
    for _ in range(5):
        w = rng.uniform(1, 3, size=(60, 28)).astype(np.float32)
        w[:6] = 0
        scales = np.asarray(LeastSquaresBinary(bits=2).quantize(w).scale)
        assert (scales[0] >= scales[1]).all()
        assert (scales[1] >= 0).all()
