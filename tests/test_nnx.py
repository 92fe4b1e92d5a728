"""Blended NNX modules: equal to what is made by hand, sharing what is not blended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ab_jax as ab
from ab_jax import nnx as ab_nnx

INT4 = ab.Uniform(bits=4, scale="absmax")
RULES = ab.Rules([(r".*kernel", INT4), (r".*", None)])


class Net(nnx.Module):
    """Two layers that share one kernel, batch norm between them, and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(self.dropout(self.norm(self.first(x))))


@pytest.fixture
def net(rng) -> Net:
    return Net(nnx.Rngs(int(rng.integers(2**31))))


@pytest.fixture
def x(rng) -> jax.Array:
    return jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)


def assert_same_bits(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("alpha", [0.0, 0.375, 1.0])
def test_parameters_are_those_of_the_blended_state(net, alpha):
    state = nnx.state(net, nnx.Param)
    before = jax.tree.map(np.array, state)
    blended = ab_nnx.blended(net, RULES, alpha)
    assert_same_bits(nnx.state(blended, nnx.Param), ab.blend(state, RULES, alpha))
    assert_same_bits(nnx.state(net, nnx.Param), before)  # the model is left as it is
    assert blended.first.kernel is not net.first.kernel


def test_at_alpha_1_it_is_the_module_of_the_codes(net):
    codes = ab_nnx.quantize(net, RULES)
    kernel = codes["first"]["kernel"].get_raw_value()
    assert_same_bits(kernel, INT4.quantize(net.first.kernel[...]))
    deployed = ab_nnx.with_params(net, codes)
    blended = ab_nnx.blended(net, RULES, 1.0)
    assert_same_bits(nnx.state(deployed, nnx.Param), nnx.state(blended, nnx.Param))
    assert deployed.first.kernel is deployed.second.kernel


def test_the_gradient_of_tied_weights_is_the_sum_of_both_places(rng, x):
    """Of sum(x W W) through the blend, in float64 by hand, times what alpha leaves."""
    net = Net(nnx.Rngs(int(rng.integers(2**31))))

    @nnx.jit
    def gradient(net, alpha):
        def loss(net):
            tied = ab_nnx.blended(net, RULES, alpha)
            assert tied.first.kernel is tied.second.kernel
            return tied.second(tied.first(x)).sum()

        return nnx.value_and_grad(loss)(net)

    value, grads = gradient(net, 0.25)
    state = ab.blend(nnx.state(net, nnx.Param), RULES, 0.25)
    w = np.asarray(state["first"]["kernel"][...], np.float64)
    inputs, ones = np.asarray(x, np.float64), np.ones((8, 4))
    wanted = inputs.T @ (ones @ w.T) + (inputs @ w).T @ ones
    np.testing.assert_allclose(value, (inputs @ w @ w).sum(), rtol=1e-4, atol=1e-4)
    found = grads["first"]["kernel"][...]
    np.testing.assert_allclose(found, 0.75 * wanted, rtol=1e-4, atol=1e-4)
    assert "kernel" not in grads["second"]  # the one parameter has one gradient


def test_batch_statistics_and_random_streams_reach_the_model(net, x):
    mean = 0.5 * (x @ ab.blend(net.first.kernel[...], ab.Rules([("", INT4)]), 0.5)).mean(0)

    @nnx.jit
    def step(net, x):
        return nnx.value_and_grad(lambda net: ab_nnx.blended(net, RULES, 0.5)(x).sum())(net)

    count = int(net.dropout.rngs.count[...])
    step(net, x)
    np.testing.assert_allclose(net.norm.mean[...], mean, rtol=1e-4, atol=1e-6)
    assert int(net.dropout.rngs.count[...]) == count + 1
    other = ab_nnx.with_params(net, nnx.state(net, nnx.Param))
    assert other.norm.mean is net.norm.mean


def test_another_estimator_and_learned_scales(net, x):
    scales = ab.initial_scales(nnx.state(net, nnx.Param), RULES)
    assert list(scales) == ["first/kernel"]
    doubled = {path: 2 * scale for path, scale in scales.items()}
    blended = ab_nnx.blended(net, RULES, 1.0, estimator=ab.learned_step_size, scales=doubled)
    codes = ab_nnx.quantize(net, RULES, scales=doubled)
    wanted = ab_nnx.with_params(net, codes).first.kernel[...]
    np.testing.assert_allclose(blended.first.kernel[...], wanted, rtol=1e-6)
    np.testing.assert_array_equal(
        codes["first"]["kernel"].get_raw_value().scale, doubled["first/kernel"]
    )


def test_subclasses_of_param_and_other_filters(rng):
    net = nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(int(rng.integers(2**31))))
    rules = ab.Rules([("lora/lora_a", INT4), (".*", None)])
    blended = ab_nnx.blended(net, rules, 1.0)
    assert type(blended.lora.lora_a) is nnx.LoRAParam
    a = net.lora.lora_a[...]
    np.testing.assert_array_equal(blended.lora.lora_a[...], INT4.quantize(a).dequantize())
    alone = ab_nnx.blended(net, rules, 1.0, only=nnx.LoRAParam)
    np.testing.assert_array_equal(alone.lora.lora_a[...], blended.lora.lora_a[...])
    assert alone.kernel is net.kernel  # what the filter leaves out is shared


def test_errors_name_the_culprit(net):
    with pytest.raises(TypeError, match="not dict"):
        ab_nnx.blended({"kernel": jnp.ones((2, 2))}, RULES, 0.5)
    with pytest.raises(ValueError, match=r"'second/kernel' matches no parameter"):
        ab_nnx.blended(net, ab.Rules([("second/kernel", INT4), (".*", None)]), 0.5)
    with pytest.raises(ValueError, match="alpha is 2"):
        ab_nnx.blended(net, RULES, 2.0)
    other = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    wider = nnx.state(nnx.Linear(4, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"Linear: bias has the shape \(3,\) in the model"):
        ab_nnx.with_params(other, wider)
    with pytest.raises(ValueError, match="no parameters"):
        ab_nnx.quantize(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), RULES)
