"""Weights to train from: they round to the calibrated codes, and are moved no further than that."""

import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.calibration import Gptq, calibrate
from ab_jax.calibration.latents import within_cells


@pytest.mark.parametrize(
    "quantizer",
    [
        *(ab.Uniform(bits=bits) for bits in (2, 4, 8)),
        ab.Uniform(bits=4, axis=None),
        ab.Uniform(bits=3, group_size=4),
        ab.Ternary(),
        ab.Binary(),
        ab.Uniform(bits=4, symmetric=False),
    ],
    ids=str,
)
def test_each_weight_is_moved_to_the_nearest_one_that_rounds_to_its_code(rng, quantizer):
    w = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)
    codes = quantizer.quantize(w)
    lowest, highest, step = codes.code_range()
    moves = step * rng.integers(-1, 2, w.shape)
    chosen = np.clip(np.asarray(codes.codes) + moves, lowest, highest)
    if step == 2:  # -1 and 1
        chosen = rng.choice([-1, 1], w.shape)
    codes = type(codes)(
        codes=jnp.asarray(chosen, jnp.int8),
        scale=codes.scale,
        zero_point=codes.zero_point,
        bits=codes.bits,
        dtype=codes.dtype,
    )
    found = np.asarray(within_cells(codes, w), np.float64)
    unit = np.asarray(codes.unit(), np.float64)
    zero = 0.0
    if codes.zero_point is not None:
        zero = np.broadcast_to(np.asarray(codes.zero_point, np.float64), w.shape)
    for value in (found, np.asarray(w, np.float64)):
        offsets = value / unit + zero
        at = lowest + step * np.round((offsets - lowest) / step)
        rounds = np.clip(at, lowest, highest) == chosen
        if value is found:
            assert np.all(rounds)
        else:  # who rounds to its code is moved by the margin at most, the others to the border
            distance = np.abs(found - value) / unit
            assert np.all(distance[rounds] <= 2e-3 * step)
            border = np.abs(offsets - chosen) - step / 2
            assert np.all(np.abs(distance - border)[~rounds] <= 2e-3 * step)
            assert np.any(~rounds)


def test_in_bfloat16_a_code_is_kept_although_weights_are_coarse(rng):
    w = jnp.asarray(rng.standard_normal((64, 5)), jnp.bfloat16)
    codes = ab.Uniform(bits=8).quantize(w)
    moved = np.clip(np.asarray(codes.codes) + rng.integers(-1, 2, w.shape), -127, 127)
    codes = ab.Quantized(jnp.asarray(moved, jnp.int8), codes.scale, None, codes.bits, codes.dtype)
    found = within_cells(codes, w)
    assert found.dtype == jnp.bfloat16
    offsets = np.asarray(found, np.float64) / np.asarray(codes.unit(), np.float64)
    assert np.mean(np.round(offsets) == moved) > 0.99  # some levels are no bfloat16 at all


def test_a_start_is_the_calibrated_network_itself(rng):
    """In the blend at alpha 1, bit for bit; at 0 it is near the regressed weights."""
    params = {"kernel": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((64, 4)) @ rng.standard_normal((4, 16)), jnp.float32)
    rules = ab.Rules([("kernel", ab.Uniform(bits=3))])
    found = calibrate(lambda params, x: x @ params["kernel"], params, rules, [(x,)], method=Gptq())
    scales, estimator = ab.scales_of(found.codes), ab.at_fixed_scales(ab.alpha_blend)
    nearest = ab.quantize(found.params, rules, scales=scales)["kernel"].codes
    assert np.any(nearest != found.codes["kernel"].codes)
    codes = ab.quantize(found.latents, rules, scales=scales)["kernel"]
    np.testing.assert_array_equal(codes.codes, found.codes["kernel"].codes)
    at_1 = ab.blend(found.latents, rules, 1.0, estimator=estimator, scales=scales)
    np.testing.assert_array_equal(at_1["kernel"], found.codes["kernel"].dequantize())
    unit = np.asarray(codes.unit())
    moved = np.abs(found.latents["kernel"] - found.params["kernel"]) / unit
    assert np.median(moved) < 1e-6
