"""Trainings to 8 and 4 bits beside Qwix: one model, the same levels, the same gradients.

Qwix spreads its levels over `absmax / (2**(bits - 1) - 1/2)`, so the largest weight is cut off by
half a level. Our quantizers do not; these here do, as anyone's own would. Its backward pass takes
the operands as they were before they were quantized, unless it is told otherwise; ours, as the
straight-through estimator is defined, takes what the forward pass saw.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ab_jax as ab
import ab_jax.nnx as ab_nnx
from ab_jax.products import intercept

# Qwix 0.1.8 calls what Flax 0.12 renamed.
qwix = pytest.importorskip("qwix")  # not in the environments of `make test-jax`
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelsOfQwix(ab.Quantizer):
    bits: int

    def fit_blocks(self, w, axes, largest):
        return jnp.max(jnp.abs(w), axes, keepdims=True) / (2 ** (self.bits - 1) - 0.5)

    def code_blocks(self, w, fitted):
        half = 2 ** (self.bits - 1)
        return jnp.clip(jnp.round(w / fitted), -half, half - 1), fitted, None


def a_scale_a_token(product, side, x, state):
    """8 bits, straight through."""
    scale = jnp.max(jnp.abs(x), product.contracted[side], keepdims=True) / 127.5
    value = jnp.clip(jnp.round(x / scale), -128, 127) * scale
    return x + jax.lax.stop_gradient(value - x), None


class Model(nnx.Module):
    """Qwix finds modules where methods call the module `self`."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


@pytest.mark.parametrize("bits", [8, 4])
def test_same_levels_give_the_same_answers_and_gradients(rng, bits):
    x = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    model = Model(nnx.Rngs(int(rng.integers(2**31))))
    rule = qwix.QtRule(
        module_path=".*",
        weight_qtype=f"int{bits}",
        act_qtype="int8",
        additional_qt_config={"use_original_residuals": False},
    )
    theirs = qwix.quantize_model(model, qwix.QtProvider([rule]), x)
    rules = ab.Rules([(".*kernel", LevelsOfQwix(bits=bits)), (".*", None)])
    structure, params = nnx.split(model, nnx.Param)

    def forward(params, x):
        return nnx.merge(structure, params)(x)

    def ours(params):
        effective = ab.blend(params, rules, 1.0, estimator=ab.straight_through)
        return intercept(forward, a_scale_a_token)({}, effective, x)[0]

    np.testing.assert_allclose(ours(params), theirs(x), atol=0.02)
    assert np.median(np.abs(ours(params) - theirs(x))) < 1e-5
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(ours(params))))(params)
    of_theirs = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(theirs)
    wanted = nnx.to_pure_dict(nnx.state(of_theirs, nnx.Param))
    for layer in ("up", "down"):
        for name in ("kernel", "bias"):
            found = gradient[layer][name].get_value()
            # Half-way between two levels the last bit decides: one code in a thousand may differ,
            # and with it, a little, all gradients of the layers before it.
            off = np.abs(found - wanted[layer][name]) / np.max(np.abs(wanted[layer][name]))
            assert np.median(off) < 5e-3
            assert np.max(off) < 0.03


def test_eight_bits_of_both_libraries_differ_by_less_than_a_level(rng):
    """With quantizers of our own, whose levels are not quite theirs."""
    x = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    model = Model(nnx.Rngs(int(rng.integers(2**31))))
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    theirs = qwix.quantize_model(model, qwix.QtProvider([rule]), x)(x)
    rules = ab.Rules([(".*kernel", ab.Uniform(bits=8)), (".*", None)])
    ours = ab_nnx.blended(model, rules, 1.0)(x)
    assert np.max(np.abs(ours - theirs)) < 0.05 * np.max(np.abs(theirs))
