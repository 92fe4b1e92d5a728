"""PARQ's map and least-squares binary levels against torchao's on random weights: make test-torch.

Not among the tests of `make test`, which compare with what torchao once made (references.json).
"""

import importlib.metadata
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao asks torch for what torch advises against
    from torchao.prototype.parq import LSBQuantizer

    from tests.against_torch import make_references as torchao

SHAPE = (4, 200)
SPREADS = {
    "normal": lambda rng: rng.normal(size=SHAPE),
    "uniform": lambda rng: rng.uniform(-1, 1, size=SHAPE),
    "heavy tails": lambda rng: rng.standard_t(3, size=SHAPE),
    "one sign": lambda rng: rng.gamma(1.0, size=SHAPE),
    "small": lambda rng: rng.normal(size=SHAPE) * 1e-3,
}
each_spread = pytest.mark.parametrize("spread", SPREADS)
each_width = pytest.mark.parametrize("bits", [1, 2, 3, 4])


@each_spread
@each_width
def test_levels_and_values_are_those_of_torchao(rng, spread, bits):
    weights = SPREADS[spread](rng).astype(np.float32)
    values, rising = torchao.levels(weights, bits)
    found = ab.LeastSquaresBinary(bits=bits, axis=0).quantize(weights)
    size = np.abs(weights).max()
    np.testing.assert_allclose(found.levels()[:, :, 0].T, rising, rtol=1e-4, atol=1e-5 * size)
    off = np.abs(np.asarray(found.dequantize()) - values) > 1e-4 * size
    # A weight in the middle between two levels may take either.
    assert off.mean() <= 0.005


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_two_bits_lose_no_more_than_torchao_does_for_all_channels_at_once(rng):
    weights = rng.normal(size=SHAPE).astype(np.float32)
    import torch

    values, _ = LSBQuantizer(optimal=True).quantize(torch.from_numpy(weights), 2, dim=-1)
    found = ab.LeastSquaresBinary(bits=2, axis=0).quantize(weights).dequantize()
    ours, theirs = (((weights - np.asarray(v)) ** 2).sum(1) for v in (found, values))
    assert (ours <= theirs * (1 + 1e-5)).all()


@each_spread
@pytest.mark.parametrize(
    "quantizer",
    [
        ab.Binary(axis=0),
        ab.Ternary(axis=0),
        ab.Uniform(bits=4, axis=0, scale="absmax"),
        ab.LeastSquaresBinary(bits=2, axis=0),
        ab.LeastSquaresBinary(bits=3, axis=0),
    ],
    ids=repr,
)
def test_the_map_is_that_of_torchao(rng, spread, quantizer):
    weights = SPREADS[spread](rng).astype(np.float32)
    rising = np.asarray(quantizer.quantize(weights).levels())[:, :, 0].T
    for step in (*torchao.STEPS, *rng.integers(torchao.START + 1, torchao.STOP, 3)):
        steepness = float(rng.uniform(1, 20))
        mapped, inverse_slope = torchao.proximal_map(weights, rising, int(step), steepness)
        alpha = ab.sigmoid_ramp(torchao.START, torchao.STOP, steepness)(int(step))
        np.testing.assert_allclose(1 - alpha, inverse_slope, rtol=0, atol=3e-7)
        # By their slope: the last digits of alpha in float32 are what a steep map is steep by.
        found = ab.parq(jnp.asarray(weights), quantizer, 1 - inverse_slope)
        lost = 1e-6 / inverse_slope * np.abs(weights).max()
        np.testing.assert_allclose(found, mapped, rtol=1e-5, atol=1e-6 + lost)


def test_at_the_end_the_map_is_the_nearest_level(rng):
    weights = rng.normal(size=SHAPE).astype(np.float32)
    quantizer = ab.Uniform(bits=3, axis=0, scale="absmax")
    rising = np.asarray(quantizer.quantize(weights).levels())[:, :, 0].T
    mapped, inverse_slope = torchao.proximal_map(weights, rising, torchao.STOP)
    assert inverse_slope == 0
    np.testing.assert_array_equal(ab.parq(jnp.asarray(weights), quantizer, 1.0), mapped)


def test_the_file_of_references_is_what_torchao_makes():
    stored = json.loads(torchao.PATH.read_text())
    made = torchao.references()
    assert stored.pop("versions").keys() == made.pop("versions").keys() == {*torchao.PACKAGES}
    assert all(importlib.metadata.version(name) for name in torchao.PACKAGES)
    assert_close(stored, made)


def assert_close(found, wanted):
    """Numbers to rounding, all else equal."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_close(found[key], wanted[key])
    elif isinstance(wanted, list) and wanted and isinstance(wanted[0], dict):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
