"""Coordinate descent against every change of a single code, and least squares solved as a whole."""

import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.calibration import CoordinateDescent, Gptq, gptq
from ab_jax.calibration.coordinate_descent import descend, with_best_scales
from ab_jax.calibration.even_grid import Levels
from ab_jax.calibration.gptq import damped
from ab_jax.calibration.matrices import Moments
from ab_jax.calibration.rounding_methods import Layer
from tests.calibration.test_gptq import correlated, levels_of, lost


def lost_by_column(codes: np.ndarray, weight: np.ndarray, h: np.ndarray, levels: Levels):
    error = levels.values(codes) - weight
    return np.einsum("gim,gij,gjm->gm", error, h, error)


@pytest.mark.parametrize(
    "quantizer", [ab.Binary(), ab.Uniform(bits=3), ab.Uniform(bits=2, symmetric=False)], ids=str
)
def test_no_change_of_a_single_code_loses_less(rng, quantizer):
    weight, h = rng.normal(size=(1, 12, 7)), correlated(rng, 1, 12)
    levels = levels_of(weight, quantizer)
    start = levels.codes(weight)
    found = descend(weight, h, start, levels, sweeps=100)
    assert lost(found, weight, h, levels) < lost(start, weight, h, levels)
    at_rest = lost_by_column(found, weight, h, levels)
    for row in range(12):
        for code in range(levels.lowest, levels.highest + 1, levels.step):
            other = found.copy()
            other[:, row] = code
            assert np.all(lost_by_column(other, weight, h, levels) >= at_rest * (1 - 1e-9))


@pytest.mark.parametrize("axis", [-1, None], ids=["channel", "tensor"])
def test_scales_are_those_of_least_squares(rng, axis):
    weight, h = rng.normal(size=(1, 15, 4)), correlated(rng, 1, 15)
    levels = levels_of(weight, ab.Uniform(bits=3, axis=axis))
    codes = gptq(weight, h, levels)
    found = with_best_scales(weight, h, codes, levels)
    root = np.linalg.cholesky(h[0]).T  # lost are the squares of root @ error
    columns = [slice(i, i + 1) for i in range(4)] if axis == -1 else [slice(0, 4)]
    for column in columns:
        steps, wanted = root @ codes[0][:, column], root @ weight[0][:, column]
        scale = np.linalg.lstsq(steps.reshape(-1, 1), wanted.ravel(), rcond=None)[0]
        np.testing.assert_allclose(found.scale[0][:, column], scale.item(), rtol=1e-9)


def test_scales_of_groups_come_to_rest_at_their_joint_least_squares(rng):
    weight, h = rng.normal(size=(1, 12, 3)), correlated(rng, 1, 12)
    levels = levels_of(weight, ab.Uniform(bits=4, group_size=4, group_axis=0))
    codes = levels.codes(weight)
    losses = [lost(codes, weight, h, levels)]
    for _ in range(500):
        levels = with_best_scales(weight, h, codes, levels)
        losses.append(lost(codes, weight, h, levels))
    assert np.all(np.diff(losses) <= 1e-9 * losses[0])
    root = np.linalg.cholesky(h[0]).T
    for column in range(3):
        parts = np.kron(np.eye(3), np.ones((4, 1))) * codes[0][:, column : column + 1]
        scales = np.linalg.lstsq(root @ parts, root @ weight[0][:, column], rcond=None)[0]
        assert np.all(scales > 0)
        np.testing.assert_allclose(levels.scale[0][::4, column], scales, rtol=1e-5)


def test_scales_that_would_not_be_positive_stay(rng):
    weight, h = rng.normal(size=(1, 9, 3)), np.eye(9)[None]
    levels = levels_of(weight, ab.Uniform(bits=4))
    codes = levels.codes(weight)
    codes[:, :, 0] *= -1
    codes[:, :, 1] = 0
    found = with_best_scales(weight, h, codes, levels)
    np.testing.assert_array_equal(found.scale[..., :2], levels.scale[..., :2])
    assert np.all(found.scale > 0)


def test_it_loses_no_more_than_gptq_and_less_in_the_mean(rng):
    ratios = []
    for _ in range(40):
        weight, h = rng.normal(size=(2, 20, 5)), correlated(rng, 2, 20)
        quantized = ab.Uniform(bits=3).quantize(jnp.asarray(weight.reshape(40, 5), jnp.float32))
        levels = Levels.of(quantized, np.arange(200).reshape(2, 20, 5))
        means = np.zeros((2, 20))
        layer = Layer(weight, levels, Moments(60, means, means, h, h))
        moments = damped(h, 0.01)
        before, after = (
            lost(rounded.codes, weight, moments, rounded.levels)
            for rounded in (Gptq()(layer), CoordinateDescent()(layer))
        )
        assert after <= before * (1 + 1e-9)
        ratios.append(after / before)
    assert np.mean(ratios) < 0.95


def test_inputs_that_are_always_zero_change_nothing(rng):
    weight = rng.normal(size=(1, 6, 2))
    levels = levels_of(weight, ab.Uniform(bits=4))
    means = np.zeros((1, 6))
    nothing = Moments(1, means, means, np.zeros((1, 6, 6)), np.zeros((1, 6, 6)))
    found = CoordinateDescent()(Layer(weight, levels, nothing))
    np.testing.assert_array_equal(found.codes, levels.codes(weight))
    assert np.all(np.isfinite(found.values))
