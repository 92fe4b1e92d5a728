"""GPTQ against its definition, solved anew for every weight, and against all codes there are."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.calibration import gptq
from ab_jax.calibration.even_grid import Levels


def levels_of(weight: np.ndarray, quantizer: ab.Quantizer) -> Levels:
    """Of a weight [1, n, m], a scale for each of its columns."""
    quantized = quantizer.quantize(jnp.asarray(weight[0], jnp.float32))
    return Levels.of(quantized, np.arange(weight[0].size).reshape(weight.shape))


def correlated(rng: np.random.Generator, groups: int, n: int) -> np.ndarray:
    """Second moments of inputs that have much to do with each other."""
    rows = rng.normal(size=(groups, 3 * n, n)) @ (rng.normal(size=(groups, n, n)) + 2)
    return rows.swapaxes(1, 2) @ rows / (3 * n)


def lost(codes: np.ndarray, weight: np.ndarray, moments: np.ndarray, levels: Levels) -> float:
    error = levels.values(codes) - weight
    return float(np.einsum("gim,gij,gjm->", error, moments, error))


def by_definition(weight: np.ndarray, moments: np.ndarray, levels: Levels) -> np.ndarray:
    """Round the weight of the largest moment; the others become the best there is with it fixed."""
    codes = np.empty_like(weight)
    for g, h in enumerate(moments):
        order = np.argsort(-np.diag(h))
        h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
        w = weight[g].copy()
        for i, row in enumerate(order):
            rows = np.full(len(moments), row)
            of_row = levels.at(rows)
            codes[g, row] = of_row.codes(np.broadcast_to(w[row], (len(moments), w.shape[1])))[g]
            error = w[row] - of_row.values(np.broadcast_to(codes[g, row], of_row.scale.shape))[g]
            rest = order[i + 1 :]
            if len(rest):
                # The minimum of e'He over the rest, with the error of this one as it is.
                w[rest] += np.linalg.solve(h[np.ix_(rest, rest)], np.outer(h[rest, row], error))
    return codes


@pytest.mark.parametrize(
    "quantizer", [ab.Uniform(bits=3), ab.Uniform(bits=2, symmetric=False)], ids=str
)
@pytest.mark.parametrize(("n", "m"), [(7, 5), (150, 3)])
def test_codes_are_those_of_its_definition(rng, quantizer, n, m):
    """150 weights are more than one block of updates."""
    weight, moments = rng.normal(size=(1, n, m)), correlated(rng, 1, n)
    levels = levels_of(weight, quantizer)
    found = gptq(weight, moments, levels)
    wanted = by_definition(weight, moments, levels)
    # Half-way between two levels the last bit decides, and what follows differs.
    same = np.all(found == wanted, axis=1).mean()
    assert (
        same == 1
        or abs(lost(found, weight, moments, levels) / lost(wanted, weight, moments, levels) - 1)
        < 0.05
    )
    assert same > 0.5


def test_groups_are_apart_from_each_other(rng):
    weight, moments = rng.normal(size=(3, 9, 1)), correlated(rng, 3, 9)
    columns = weight[:, :, 0].T[None]
    of_columns = levels_of(columns, ab.Uniform(bits=3))
    take = lambda x: x[0].T[:, :, None]
    levels = Levels(*map(take, (of_columns.scale, of_columns.zero, of_columns.blocks)), -3, 3, 1)
    found = gptq(weight, moments, levels)
    for g in range(3):
        one = Levels(
            levels.scale[g : g + 1], levels.zero[g : g + 1], levels.blocks[g : g + 1], -3, 3, 1
        )
        np.testing.assert_array_equal(
            found[g : g + 1], gptq(weight[g : g + 1], moments[g : g + 1], one)
        )


def test_it_lies_between_the_best_codes_and_rounding(rng):
    """All codes of five ternary weights are tried, in 120 draws."""
    ratios, of_rounding = [], []
    for _ in range(120):
        weight, moments = rng.normal(size=(1, 5, 1)), correlated(rng, 1, 5)
        levels = levels_of(weight, ab.Ternary())
        every = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=5)))[:, None, :, None]
        best = min(lost(codes, weight, moments, levels) for codes in every)
        found = lost(gptq(weight, moments, levels), weight, moments, levels)
        rounded = lost(levels.codes(weight), weight, moments, levels)
        assert found >= best * (1 - 1e-9)
        ratios.append(found / best)
        of_rounding.append(rounded / best)
    assert np.mean(np.log(ratios)) < np.mean(np.log(of_rounding)) - 0.2


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded(rng):
    weight = rng.normal(size=(1, 20, 4))
    levels = levels_of(weight, ab.Uniform(bits=4))
    moments = np.diag(rng.uniform(0.1, 5, 20))[None]
    np.testing.assert_array_equal(gptq(weight, moments, levels), levels.codes(weight))
    # Inputs that are always 0 have no moments at all.
    np.testing.assert_array_equal(gptq(weight, 0 * moments, levels), levels.codes(weight))


@pytest.mark.parametrize(
    "quantizer",
    [ab.Binary(), ab.Ternary(), ab.Uniform(bits=5), ab.Uniform(bits=3, symmetric=False)],
    ids=str,
)
def test_nearest_levels_are_those_of_the_quantizer(rng, quantizer):
    weight = rng.normal(size=(6, 4)).astype(np.float32)
    quantized = quantizer.quantize(weight)
    levels = Levels.of(quantized, np.arange(24).reshape(1, 6, 4))
    np.testing.assert_array_equal(levels.codes(weight[None])[0], quantized.codes)
    np.testing.assert_allclose(
        levels.values(levels.codes(weight[None]))[0], quantized.dequantize(), rtol=1e-6
    )
    extremes = levels.values(levels.codes(np.broadcast_to([[[1e9], [-1e9]] * 3], (1, 6, 4))))[0]
    every = np.asarray(quantized.levels())
    np.testing.assert_allclose(extremes[0], every[-1, 0], rtol=1e-6)
    np.testing.assert_allclose(extremes[1], every[0, 0], rtol=1e-6)
