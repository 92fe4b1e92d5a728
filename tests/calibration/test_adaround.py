"""AdaRound: its relaxation against the paper's formulas, its codes against all ways to round."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.calibration.adaround import adaround, share_up, undecided, variable_of
from tests.calibration.test_gptq import correlated, levels_of, lost


def test_the_relaxation_is_that_of_the_paper(rng):
    v = rng.normal(size=200) * 4
    stretched = 1.2 / (1 + np.exp(-v)) - 0.1
    np.testing.assert_allclose(share_up(jnp.asarray(v)), np.clip(stretched, 0, 1), atol=1e-6)
    share = rng.uniform(0, 1, 50)
    np.testing.assert_allclose(share_up(variable_of(share)), share, atol=1e-6)
    for progress, sharpness in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        terms = 1 - np.abs(2 * np.clip(stretched, 0, 1) - 1) ** sharpness
        found = undecided(jnp.asarray(v), progress)
        np.testing.assert_allclose(found, np.mean(terms), rtol=1e-4)


def test_the_regularizer_counts_after_a_fifth_and_spares_the_decided(rng):
    v = jnp.asarray(rng.normal(size=30))
    assert undecided(v, 0.19) == 0
    assert undecided(v, 0.5) > 0
    np.testing.assert_allclose(undecided(jnp.asarray([-30.0, 30.0]), 0.9), 0, atol=1e-6)


@pytest.mark.parametrize(
    "quantizer",
    [ab.Binary(), ab.Ternary(), ab.Uniform(bits=3), ab.Uniform(bits=4, symmetric=False)],
    ids=str,
)
def test_every_weight_goes_to_the_level_above_or_below(rng, quantizer):
    weight, h = 3 * rng.normal(size=(1, 16, 6)), correlated(rng, 1, 16)
    levels = levels_of(weight, quantizer)
    codes = adaround(weight, h, levels, steps=100)
    assert np.all((codes >= levels.lowest) & (codes <= levels.highest))
    assert np.all((codes - levels.lowest) % levels.step == 0)
    width = levels.step * levels.scale
    lowest, highest = levels.values(levels.lowest), levels.values(levels.highest)
    error = np.abs(levels.values(codes) - np.clip(weight, lowest, highest))
    assert np.all(error <= width * (1 + 1e-6))


def test_it_lies_between_the_best_way_to_round_and_the_nearest(rng):
    """All ways to round eight weights up or down are tried, in 120 draws."""
    of_best, of_nearest = [], []
    for _ in range(120):
        weight, h = rng.normal(size=(1, 8, 1)), correlated(rng, 1, 8)
        levels = levels_of(weight, ab.Uniform(bits=4))
        below = np.clip(np.floor(weight / levels.scale), -7, 6)
        ways = itertools.product((0, 1), repeat=8)
        best = min(lost(below + np.reshape(up, (1, 8, 1)), weight, h, levels) for up in ways)
        found = lost(adaround(weight, h, levels), weight, h, levels)
        assert found >= best * (1 - 1e-6)
        of_best.append(found / best)
        of_nearest.append(found / lost(levels.codes(weight), weight, h, levels))
    assert np.mean(np.log(of_nearest)) < np.log(0.75)
    assert np.mean(np.log(of_best)) < np.log(2)


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest(rng):
    weight = rng.normal(size=(1, 20, 4))
    levels = levels_of(weight, ab.Uniform(bits=4))
    moments = np.diag(rng.uniform(0.5, 2, 20))[None]
    nearest = levels.codes(weight)
    middle = np.abs(weight / levels.scale - np.floor(weight / levels.scale) - 0.5) < 0.1
    same = (adaround(weight, moments, levels) == nearest) | middle
    assert np.mean(same) > 0.97
    assert np.all(np.isfinite(adaround(weight, 0 * moments, levels)))
