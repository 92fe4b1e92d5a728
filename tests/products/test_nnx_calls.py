"""NNX modules with quantized inputs are called as they are without: by keywords, and with flags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ab_jax import nnx as ab_nnx
from ab_jax.activations import ActivationQuantizer
from ab_jax.products import ActivationRules

EIGHT = ActivationRules([(".*", ActivationQuantizer(bits=8))])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.second = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, scale=None, *, train=False, head="dense"):
        x = self.norm(self.first(x), use_running_average=not train)
        x = x if scale is None else x * scale
        return self.second(x) if head == "dense" else x


@pytest.fixture
def net(rng):
    return Net(nnx.Rngs(int(rng.integers(2**31))))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)


CALLS = {
    "a flag": ((), {"train": True}),
    "a flag and a string": ((), {"train": False, "head": "none"}),
    "an array by its keyword": ((), {"scale": jnp.float32(2)}),
    "an array and a flag": ((jnp.float32(3),), {"train": True, "head": "dense"}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_the_models_own(net, x, call):
    more, keywords = CALLS[call]
    ranges = ab_nnx.initial_ranges(net, EIGHT, x, *more, **keywords)
    described = ab_nnx.describe_products(net, x, *more, input_rules=EIGHT, **keywords)
    layers = ["first/kernel", *["second/kernel"] * (keywords.get("head") != "none")]
    assert [row.product.address for row in described.rows] == list(ranges.get_value()) == layers

    other = nnx.clone(net)
    quantized = ab_nnx.quantize_inputs(net, EIGHT, ranges, alpha=0.0, measure=True)
    found, wanted = quantized(x, *more, **keywords), other(x, *more, **keywords)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net.norm.mean[...], other.norm.mean[...], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ranges.get_value()["first/kernel"].limit, np.abs(x).max())


def test_ranges_of_batches_take_the_keywords_of_all(net, x):
    batches = [(x, jnp.float32(k)) for k in (1, 2)]
    hidden = nnx.clone(net)(2 * x, jnp.float32(2), train=True, head="none")
    ranges = ab_nnx.measure_ranges(net, EIGHT, batches, train=True).get_value()
    np.testing.assert_allclose(ranges["first/kernel"].limit, np.abs(x).max())
    # Batch norm takes out that the input is twice as large, and the scale does not.
    largest = np.abs(hidden).max()
    np.testing.assert_allclose(ranges["second/kernel"].limit, largest, rtol=1e-3)
    np.testing.assert_array_equal(net.norm.mean[...], np.zeros(5))


def test_under_jit_flags_are_the_callers(net, x):
    ranges = ab_nnx.measure_ranges(net, EIGHT, [(x,)], train=True)

    @nnx.jit
    def step(model, ranges, x):
        return ab_nnx.quantize_inputs(model, EIGHT, ranges, measure=True)(x, train=True)

    exact = nnx.clone(net)(x, train=True)
    found = step(net, ranges, x)
    assert 0 < np.max(np.abs(found - exact)) < 0.05 * np.max(np.abs(exact))
    assert jax.tree.structure(found) == jax.tree.structure(exact)
