"""Linen models as functions for exporters: ranges, what was never measured, older ways."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.inference import Inference, inference
from ab_jax.export.traced import TracedFunction, trace
from ab_jax.export.traced.computing import evaluate
from ab_jax.linen import RANGES, QuantizedInputs, WithQuantizedInputs
from ab_jax.models.binarynet import BinaryNet
from ab_jax.products import ActivationRules
from tests.export.small_networks import make


def traced(net: Inference, shape: tuple[int, ...]) -> TracedFunction:
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return trace(net.function, net.params, images, rules=net.rules, ranges=net.ranges)


def quantized_inputs(net: TracedFunction) -> int:
    return sum(operation.primitive == "quantize" for operation in net.graph.operations)


class Dense(nn.Module):
    """A model without `train`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3, name="b")(nn.relu(nn.Dense(5, name="a")(x)))


RULES = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=True))])


def dense_model(rng: np.random.Generator, limits: dict[str, float]) -> tuple[Any, Any, Any]:
    model, x = WithQuantizedInputs(Dense(), RULES), rng.normal(size=(4, 6)).astype(np.float32)
    variables = dict(model.init(jax.random.key(0), x))
    variables[RANGES] = {name: {"kernel": jnp.float32(x)} for name, x in limits.items()}
    return model, variables, x


def test_any_linen_model_is_its_function(rng: np.random.Generator) -> None:
    model, variables, x = dense_model(rng, {"a": 3.0, "b": 2.0})
    net = traced(inference(model, variables), x.shape[1:])
    assert quantized_inputs(net) == 2
    wanted = model.apply(variables, x)
    np.testing.assert_allclose(evaluate(net, x), wanted, rtol=0, atol=1e-5)
    plain = traced(inference(Dense(), {"params": variables["params"]}), x.shape[1:])
    assert quantized_inputs(plain) == 0
    wanted = Dense().apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(evaluate(plain, x), wanted, rtol=1e-5, atol=1e-6)


def test_an_input_that_was_never_measured_stays_as_it_is(rng: np.random.Generator) -> None:
    model, variables, x = dense_model(rng, {"a": 3.0, "b": 0.0})
    net = traced(inference(model, variables), x.shape[1:])
    assert quantized_inputs(net) == 1
    np.testing.assert_allclose(evaluate(net, x), model.apply(variables, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_range_that_is_not_finite_is_refused_by_name(
    rng: np.random.Generator, value: float
) -> None:
    """Not left out: the input would stay in float."""
    model, variables, x = dense_model(rng, {"a": 3.0, "b": value})
    with pytest.raises(ValueError, match=f"range of the input of b/kernel is {value}"):
        traced(inference(model, variables), x.shape[1:])


def test_boxes_of_flax_are_refused_by_name(rng: np.random.Generator) -> None:
    model, variables, _ = make("binarynet", rng)
    kernel = nn.LogicallyPartitioned(variables["params"]["conv0"]["kernel"], (None,) * 4)
    boxed = {"params": {**variables["params"], "conv0": {"kernel": kernel}}}
    with pytest.raises(ValueError, match=r"params/conv0/kernel is a Log.*flax\.linen\.unbox"):
        inference(model, {**variables, **boxed})


def test_a_model_that_quantizes_its_inputs_by_itself_is_carried_too(
    rng: np.random.Generator,
) -> None:
    """As until version 0.2."""
    model, variables, shape = make("binarynet", rng)
    assert isinstance(model, WithQuantizedInputs)
    with pytest.warns(FutureWarning, match="WithQuantizedInputs takes its place"):
        old = BinaryNet(
            width=1 / 16, num_classes=5, quantize_input=QuantizedInputs(rules=model.rules)
        )
    ranges = {f"{name}_input": limit["kernel"] for name, limit in variables[RANGES].items()}
    net = traced(inference(old, {**variables, RANGES: ranges}), shape)
    assert quantized_inputs(net) == 9
    images = jnp.asarray(rng.normal(size=(12, *shape)), jnp.float32)
    wanted = model.apply(ab.dequantize(variables), images, train=False)
    apart = np.abs(evaluate(net, images) - wanted).max(axis=1) / np.ptp(wanted)
    assert np.median(apart) < 1e-5  # of one image in a hundred a code tips
