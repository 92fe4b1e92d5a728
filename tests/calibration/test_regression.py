"""Ridge regression against its closed form; its strength against inputs that were not fitted."""

import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.calibration import calibrate
from ab_jax.calibration.matrices import Moments
from ab_jax.calibration.regression import STRENGTHS, best_strength, regressed
from tests.calibration.test_calibrating import THREE


def folds_of(inputs, plain, count):
    """Moments of [groups, rows, n] in `count` folds."""
    parts = zip(np.split(inputs, count, 1), np.split(plain, count, 1), strict=True)
    folds = [[(jnp.asarray(q, jnp.float32), jnp.asarray(p, jnp.float32))] for q, p in parts]
    return Moments.of_folds(folds, about_mean=True)


def noisy(rng, rows, n, noise):
    """Inputs of a float network, and the same with errors, some of which follow from them."""
    plain = rng.normal(size=(2, rows, n)) @ rng.normal(size=(2, n, n))
    lost = plain @ rng.normal(size=(2, n, n)) * 0.1
    return plain + lost + noise * rng.normal(size=plain.shape), plain


@pytest.mark.parametrize("strength", [0.01, 0.5, 20.0])
def test_the_weight_is_that_of_least_squares_with_a_penalty(rng, strength):
    inputs, plain = noisy(rng, 60, 7, 0.3)
    moments = Moments.joined(folds_of(inputs, plain, 3))
    weight = rng.normal(size=(2, 7, 4))
    found = regressed(weight, moments, strength)
    for g in range(2):
        x, y = inputs[g] - inputs[g].mean(0), plain[g] - plain[g].mean(0)
        root = np.sqrt(60 * strength * np.mean(x**2))
        left = np.vstack([x, root * np.eye(7)])
        right = np.vstack([y @ weight[g], root * weight[g]])
        wanted = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(found[g], wanted, rtol=1e-3, atol=1e-4)


def test_infinitely_strong_is_the_weight_itself(rng):
    inputs, plain = noisy(rng, 20, 5, 0.3)
    weight = rng.normal(size=(2, 5, 3))
    moments = Moments.joined(folds_of(inputs, plain, 2))
    np.testing.assert_array_equal(regressed(weight, moments, np.inf), weight)


def test_moments_of_folds_make_those_of_all_rows(rng):
    inputs, plain = noisy(rng, 60, 5, 0.3)
    joined = Moments.joined(folds_of(inputs, plain, 4))
    whole = folds_of(inputs, plain, 1)[0]
    assert joined.count == whole.count == 60
    for name in ("mean", "plain_mean", "own", "cross"):
        np.testing.assert_allclose(
            getattr(joined, name), getattr(whole, name), rtol=1e-4, atol=1e-4
        )


def test_the_strength_is_near_the_best_for_rows_that_come_later(rng):
    """In thirty layers, of few rows that tell little and of many that tell much: never far off,
    and better than any fixed one."""
    tried = (0.001, 0.01, *STRENGTHS)
    chosen, fixed = [], {strength: [] for strength in tried}
    for _ in range(15):
        for rows, noise in ((24, 2.0), (2000, 0.3)):
            inputs, plain = noisy(rng, rows + 4000, 16, noise)
            weight = rng.normal(size=(2, 16, 3))
            folds = folds_of(inputs[:, :rows], plain[:, :rows], 4)
            later, wanted = inputs[:, rows:], plain[:, rows:] @ weight

            def lost(strength, folds=folds, weight=weight, later=later, wanted=wanted):
                found = regressed(weight, Moments.joined(folds), strength)
                error = later @ found - wanted
                return np.mean((error - error.mean(1, keepdims=True)) ** 2)

            of_each = {strength: lost(strength) for strength in tried}
            best = min(of_each.values())
            chosen.append(np.log(of_each[best_strength(weight, folds, tried)] / best))
            for strength, value in of_each.items():
                fixed[strength].append(np.log(value / best))
    assert np.mean(chosen) < 0.1
    assert np.mean(chosen) < min(np.mean(values) for values in fixed.values())


def test_what_no_regression_mends_is_left_alone(rng):
    """Errors that have nothing to do with the inputs, and a row for each weight; in ten layers."""
    strengths = []
    for _ in range(10):
        plain = rng.normal(size=(1, 24, 24))
        inputs = plain + 1e-3 * rng.normal(size=plain.shape)
        weight = rng.normal(size=(1, 24, 3))
        strengths.append(best_strength(weight, folds_of(inputs, plain, 4)))
    assert np.median(strengths) >= 1


def test_inputs_that_are_always_zero_are_no_matter(rng):
    nothing = np.zeros((1, 12, 4))
    weight = rng.normal(size=(1, 4, 2))
    folds = folds_of(nothing, nothing, 3)
    strength = best_strength(weight, folds)
    np.testing.assert_allclose(regressed(weight, Moments.joined(folds), strength), weight)


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_each_layer_tells_its_strength(rng, batches):
    kernels = {n: jnp.asarray(rng.normal(size=(6, 6)), jnp.float32) for n in ("a", "b")}
    f = lambda p, x: jnp.tanh(x @ p["a/kernel"]) @ p["b/kernel"]
    params = {f"{n}/kernel": w for n, w in kernels.items()}
    xs = [(jnp.asarray(rng.normal(size=(20, 6)), jnp.float32),) for _ in range(batches)]
    found = calibrate(f, params, THREE, xs)
    assert all(layer.regression in STRENGTHS for layer in found.layers)
    # The first layer's inputs are those in float, from which nothing is to be learned.
    np.testing.assert_allclose(found.params["a/kernel"], params["a/kernel"], rtol=1e-4, atol=1e-5)
    given = calibrate(f, params, THREE, xs, regression=0.3)
    assert [layer.regression for layer in given.layers] == [0.3, 0.3]


def test_a_single_row_is_not_regressed(rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    found = calibrate(lambda p, x: x @ p["kernel"], params, THREE, [(jnp.ones((1, 3)),)])
    assert found.layers[0].regression == np.inf
