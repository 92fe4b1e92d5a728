"""PARQ's proximal map: its closed form in float64, its ends, its slopes, its gradient."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax import (
    Binary,
    LeastSquaresBinary,
    Quantizer,
    Ternary,
    Uniform,
    parq,
    sigmoid_ramp,
)

SHAPE = (40, 3)
QUANTIZERS = [
    Binary(),
    Ternary(axis=None),
    Uniform(bits=3, symmetric=False, scale="absmax"),
    LeastSquaresBinary(bits=2),
    LeastSquaresBinary(bits=3),
]
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
map_of = jax.jit(parq, static_argnums=1)
levels_made = jax.jit(lambda w, quantizer: quantizer.quantize(w).levels(), static_argnums=1)


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=SHAPE).astype(np.float32)


def levels_of(weights: np.ndarray, quantizer) -> np.ndarray:
    levels = np.asarray(levels_made(weights, quantizer), np.float64)
    return np.broadcast_to(levels, (len(levels), 1, SHAPE[1]))[:, 0]


def proximal_map(weights: np.ndarray, levels: np.ndarray, alpha: float) -> np.ndarray:
    """The map as an interpolation in float64: flat at each level, steep around each middle."""
    mapped = np.empty(weights.shape)
    for channel, rising in enumerate(levels.T):
        middles, gaps = (rising[1:] + rising[:-1]) / 2, np.diff(rising)
        corners = np.stack(
            [middles - (1 - alpha) * gaps / 2, middles + (1 - alpha) * gaps / 2], axis=1
        ).ravel()
        heights = np.stack([rising[:-1], rising[1:]], axis=1).ravel()
        mapped[:, channel] = np.interp(weights[:, channel], corners, heights)
    return mapped


@each_quantizer
def test_the_map_is_its_closed_form(rng, weights, quantizer):
    levels = levels_of(weights, quantizer)
    for alpha in (0.01, 0.5, *rng.uniform(0, 0.99, size=3)):
        found = map_of(weights, quantizer, alpha)
        assert found.dtype == jnp.float32
        wanted = proximal_map(weights.astype(np.float64), levels, alpha)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 / (1 - alpha))


@pytest.mark.parametrize(
    ("quantizer", "dtype", "jitted"),
    [
        *((quantizer, "float32", True) for quantizer in QUANTIZERS),
        (Binary(), "bfloat16", True),
        (Binary(), "float32", False),
    ],
    ids=repr,
)
def test_both_ends_are_exact(weights, quantizer, dtype, jitted):
    apply = map_of if jitted else parq
    weights[3], weights[4, 0], weights[5, 1] = -0.0, 1e-42, 1e25
    w = jnp.asarray(weights, dtype)
    for alpha, wanted in ((0.0, w), (1.0, quantizer.quantize(w).dequantize())):
        found = np.asarray(apply(w, quantizer, alpha))
        assert found.dtype == w.dtype
        assert found.tobytes() == np.asarray(wanted).tobytes()


@each_quantizer
def test_the_map_rises_with_the_weight_and_is_flat_or_as_steep_as_said(weights, quantizer):
    """On a fine grid, the levels being those of the weights: flat or of slope 1 / (1 - alpha)."""
    levels = levels_of(weights, quantizer)
    alpha = 0.6
    order = np.argsort(weights, axis=0)
    rising = np.take_along_axis(weights, order, 0).astype(np.float64)
    mapped = np.take_along_axis(np.asarray(map_of(weights, quantizer, alpha)), order, 0)
    steps, moved = np.diff(rising, axis=0), np.diff(mapped.astype(np.float64), axis=0)
    assert (moved >= -1e-6).all()
    assert (moved <= steps / (1 - alpha) + 1e-5).all()
    # Two weights in the same interval, away from its ends, are as far apart as the slope says.
    inside = np.abs(levels[:, None] - mapped).min(0) > 1e-4
    interval = (levels[:, None] < mapped).sum(0)
    together = inside[1:] & inside[:-1] & (interval[1:] == interval[:-1])
    assert together.any()
    np.testing.assert_allclose(moved[together], steps[together] / (1 - alpha), rtol=1e-3, atol=1e-5)


@each_quantizer
def test_weights_come_closer_to_their_levels_as_alpha_rises(weights, quantizer):
    levels = levels_of(weights, quantizer)
    distances = [
        np.abs(levels[:, None] - np.asarray(map_of(weights, quantizer, alpha))).min(0)
        for alpha in (0.001, 0.25, 0.5, 0.75, 0.999)
    ]
    assert (np.diff(distances, axis=0) <= 1e-6).all()
    assert distances[0].max() > 0.01
    assert (distances[-1] < 1e-5).mean() > 0.95


def test_weights_outside_the_levels_are_at_the_outermost(weights):
    weights[0] = [5.0, -7.0, 6.0]
    scale = np.abs(weights).mean(0)
    found = map_of(weights, Binary(), 1e-3)
    np.testing.assert_allclose(found[0], [scale[0], -scale[1], scale[2]], rtol=1e-6)


@pytest.mark.parametrize("quantizer", [Binary(), LeastSquaresBinary(bits=3)], ids=repr)
def test_the_gradient_reaches_the_weight_whole(rng, weights, quantizer):
    direction = rng.normal(size=SHAPE).astype(np.float32)
    gradient = jax.jit(
        jax.grad(lambda w, alpha: jnp.sum(parq(w, quantizer, alpha) * direction)),
    )
    for alpha in (0.0, 0.4, 1.0):
        np.testing.assert_array_equal(gradient(weights, alpha), direction)


# What the authors' code makes of fixed weights (tests/against_torch says how)

REFERENCES = json.loads((Path(__file__).parent / "against_torch/references.json").read_text())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(Quantizer):
    """The bits of torchao: each scale is the mean magnitude of what those before it leave over."""

    bits: int  # type: ignore[misc]

    def fit_blocks(self, w, axes, largest):
        scales = []
        for _ in range(self.bits):
            scale = jnp.mean(jnp.abs(w), axes, keepdims=True)
            w = w - jnp.where(w >= 0, 1, -1) * scale
            scales.append(scale)
        return jnp.stack(scales, axis=-1)

    def code_blocks(self, w, scales):
        codes = jnp.zeros_like(w)
        for scale in jnp.unstack(scales, axis=-1):
            signs = jnp.where(w >= 0, 1, -1)
            w, codes = w - signs * scale, 2 * codes + signs
        return codes, scales, None


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_values_and_maps_are_those_of_torchao(bits):
    w = np.asarray(REFERENCES["weights"], np.float32)
    wanted = REFERENCES["bits"][str(bits)]
    quantizer: Quantizer = LeastSquaresBinary(bits=bits, axis=0)
    if bits > 2:  # ours begin where torchao's end, and lose less
        ours = quantizer.quantize(w).dequantize()
        assert (np.square(w - ours).sum(1) < np.square(w - wanted["values"]).sum(1)).all()
        quantizer = Greedy(bits=bits, axis=0)
    quantized = quantizer.quantize(w)
    np.testing.assert_allclose(
        quantized.levels()[:, :, 0].T, wanted["levels"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(quantized.dequantize(), wanted["values"], rtol=1e-5, atol=1e-6)
    assert len(wanted["maps"]) == (0 if bits == 4 else 5)
    ramp = sigmoid_ramp(REFERENCES["start"], REFERENCES["stop"])
    for one in wanted["maps"]:
        alpha = ramp(one["step"])
        np.testing.assert_allclose(1 - alpha, one["inverse_slope"], rtol=0, atol=3e-7)
        # The last digits of alpha are what a steep map is steep by.
        found = map_of(w, quantizer, 1 - one["inverse_slope"])
        np.testing.assert_allclose(
            found, one["mapped"], rtol=1e-5, atol=1e-6 / one["inverse_slope"]
        )
