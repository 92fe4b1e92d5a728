"""Quantized inputs: by injection and by interception, the same numbers; ranges and their errors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from ab_jax.activations import ActivationQuantizer
from ab_jax.linen import (
    RANGES,
    ActivationRules,
    InputQuantizer,
    QuantizedInputs,
    describe_inputs,
    keep_input,
    layer_paths,
    quantized_inputs,
)
from tests.products.rounded_inputs import clear, rounded

# What it tests goes with the next release, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*goes with the next release:FutureWarning")

RULES = ActivationRules(
    [
        ("stem", ActivationQuantizer(bits=8, signed=True, momentum=0.9)),
        ("block/conv1", ActivationQuantizer(bits=3, limit=6.0, signed=False)),
        ("block/.*", ActivationQuantizer(bits=4, percentile=99.0, momentum=0.5, signed=False)),
        ("head", None),
    ]
)


class Block(nn.Module):
    quantize_input: InputQuantizer

    @nn.compact
    def __call__(self, x: Array, alpha: Any) -> Array:
        for name in ("conv0", "conv1"):
            y = self.quantize_input(self, name, x, alpha)
            x = nn.relu(nn.Conv(5, (3, 3), name=name)(y)) + x
        return x


class Network(nn.Module):
    quantize_input: InputQuantizer = keep_input

    @nn.compact
    def __call__(self, x: Array, alpha: Any = 1.0) -> Array:
        x = nn.relu(nn.Conv(5, (3, 3), name="stem")(self.quantize_input(self, "stem", x, alpha)))
        x = Block(self.quantize_input, name="block")(x, alpha).mean((1, 2))
        return nn.Dense(3, name="head")(self.quantize_input(self, "head", x, alpha))


def ranges(variables: Any) -> list[float]:
    return [float(leaf) for leaf in jax.tree.leaves(variables[RANGES])]


@pytest.mark.parametrize(
    "alpha", [0.3, *(pytest.param(end, marks=pytest.mark.long) for end in (0.0, 1.0))]
)
def test_both_ways_give_the_same_numbers(rng, key, alpha):
    """Outputs, gradients and ranges, over three batches whose range grows and shrinks."""
    injected, plain = Network(QuantizedInputs(RULES)), Network()
    images = [rng.normal(0, s, (4, 6, 6, 2)).astype(np.float32) for s in (1, 3, 0.5)]
    params = plain.init(key, images[0])["params"]

    def intercepted_apply(variables, x):
        with quantized_inputs(RULES, alpha):
            return plain.apply(variables, x, mutable=[RANGES])

    def injected_apply(variables, x):
        return injected.apply(variables, x, alpha, mutable=[RANGES])

    states = {}
    for apply in (intercepted_apply, injected_apply):

        def loss(params, state, x, apply=apply):
            logits, state = apply({"params": params, **state}, x)
            return jnp.sum(logits**2), (logits, state)

        state: Any = {}
        results = []
        for x in images:
            gradient, (logits, state) = jax.jit(jax.grad(loss, has_aux=True))(params, state, x)
            results.append((logits, gradient, ranges(state)))
        states[apply] = results
    for one, other in zip(*states.values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    # Of four layers one has a fixed range and one is left alone.
    assert [len(found) for _, _, found in states[injected_apply]] == [2, 2, 2]


def test_ranges_follow_the_batches_and_rest_where_they_are_not_mutable(rng, key):
    model = Network(QuantizedInputs(RULES))
    batches = [rng.normal(0, s, (4, 6, 6, 2)).astype(np.float32) for s in (1, 3, 0.5)]
    variables = model.init(key, batches[0])
    assert ranges(variables) == [0, 0], "initialization measures nothing"
    expected = None
    for x in batches:
        _, state = model.apply(variables, x, mutable=[RANGES])
        variables = {"params": variables["params"], **state}
        largest = np.abs(x).max()
        expected = largest if expected is None else 0.9 * expected + 0.1 * largest
        np.testing.assert_allclose(variables[RANGES]["stem_input"], expected, rtol=1e-6)
    before = ranges(variables)
    logits = model.apply(variables, 1e9 * batches[0])
    assert ranges(variables) == before
    # Beyond the range all images look alike.
    np.testing.assert_array_equal(logits, model.apply(variables, 2e9 * batches[0]))


def test_layers_are_quantized_by_their_own_rules(rng, key):
    """Written out by hand, with the ranges that the model keeps."""
    model = Network(QuantizedInputs(RULES))
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 2)), jnp.float32)
    variables = model.init(key, x)
    _, state = model.apply(variables, x, mutable=[RANGES])
    params, found = variables["params"], state[RANGES]

    def levels(x, limit, low, high):
        scale = jnp.float32(limit) / high
        return jnp.clip(jnp.round(x / scale), low, high) * scale

    def conv(x, name, params=params):
        y = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return nn.relu(y + params[name]["bias"].reshape(1, 1, 1, -1))

    y = conv(levels(x, found["stem_input"], -127, 127), "stem")
    block = params["block"]
    y = conv(levels(y, found["block"]["conv0_input"], 0, 15), "conv0", block) + y
    y = conv(levels(y, 6.0, 0, 7), "conv1", block) + y
    logits = y.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, -1)
    got = model.apply({"params": params, **state}, x)
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-5)


def test_layer_paths_are_those_of_dense_and_conv_layers():
    images = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
    assert layer_paths(Network(), images) == ["stem", "block/conv0", "block/conv1", "head"]
    RULES.assign(layer_paths(Network(), images))


def test_the_description_has_a_row_for_each_layer():
    images = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
    rows = [
        line.split("  ")
        for line in describe_inputs(layer_paths(Network(), images), RULES).splitlines()
    ]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["layer", "rule", "input", "range"],
        ["stem", "stem", "8 bits, signed", "maximum"],
        ["block/conv0", "block/.*", "4 bits, unsigned", "percentile 99"],
        ["block/conv1", "block/conv1", "3 bits, unsigned", "6"],
        ["head", "head"],
    ]


def test_keyword_arguments_reach_the_layer(rng, key):
    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(inputs=x)

    x = rng.normal(size=(4, 5)).astype(np.float32)
    variables = Keyword().init(key, x)
    with quantized_inputs(
        ActivationRules([(".*", ActivationQuantizer(bits=2, limit=1.0, signed=False))]), 1.0
    ):
        got = Keyword().apply(variables, x)
    kernel, bias = (variables["params"]["head"][name] for name in ("kernel", "bias"))
    rounded = np.round(np.clip(x, 0, 1) * 3) / 3
    np.testing.assert_allclose(got, rounded @ kernel + bias.reshape(1, -1), rtol=1e-5, atol=1e-5)


# Errors


def apply_with(rules: list[Any], key: Array) -> None:
    x = np.ones((2, 6, 6, 2), np.float32)
    variables = Network().init(key, x)
    with quantized_inputs(ActivationRules(rules), 1.0):
        Network().apply(variables, x, mutable=[RANGES])


def test_a_layer_without_a_rule_is_named(key):
    with pytest.raises(ValueError, match=r"No rule covers block/conv0"):
        apply_with([("stem|head", None)], key)


def test_a_rule_that_matches_no_layer_is_named(key):
    int4 = ActivationQuantizer(bits=4, signed=False)
    with pytest.raises(ValueError, match=r"Rule 'conv9' matches no layer.*stem, block/conv0"):
        apply_with([("conv9", int4), (".*", int4)], key)


def test_a_rule_takes_quantizers_of_activations_only():
    from ab_jax import Uniform

    with pytest.raises(TypeError, match=r"pair of a regular expression and a ActivationQuantizer"):
        ActivationRules([(".*", Uniform(bits=4))])


def test_missing_ranges_are_an_error_that_says_how_to_measure_them(key):
    x = np.ones((2, 6, 6, 2), np.float32)
    variables = Network().init(key, x)
    rules = ActivationRules([(".*", ActivationQuantizer(bits=4, signed=False))])
    with (
        pytest.raises(ValueError, match=r"no range for the input of stem.*mutable=\["),
        quantized_inputs(rules, 1.0),
    ):
        Network().apply(variables, x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        # The bias keeps some of what goes on above 0, so that it has a range.
        bias = nn.initializers.constant(3.0)
        return nn.relu(nn.Dense(4, bias_init=bias, name="dense")(x)), None


def scanned(**variable_axes: int) -> nn.Module:
    layers = nn.scan(
        Layer,
        variable_axes={"params": 0, **variable_axes},
        split_rngs={"params": True},
        length=3,
    )
    return layers(name="layers")


def test_scanned_layers_need_the_ranges_among_the_variable_axes(rng, key):
    x = rng.normal(size=(2, 4)).astype(np.float32)
    rules = ActivationRules([("dense", ActivationQuantizer(bits=8, signed=True))])
    params = scanned().init(key, x, None)
    with (
        pytest.raises(ValueError, match=r"nn\.scan.*variable_axes=\{'activation_ranges': 0\}"),
        quantized_inputs(rules, 1.0),
    ):
        scanned().apply(params, x, None, mutable=[RANGES])

    with quantized_inputs(rules, 1.0):
        variables = scanned(**{RANGES: 0}).init(key, x, None)
    dense = jax.tree.map(np.asarray, variables["params"]["dense"])
    all_clear = False
    while not all_clear:
        x = rng.normal(size=(2, 4)).astype(np.float32)
        wanted, limits, all_clear = x, [], True
        for kernel, bias in zip(dense["kernel"], dense["bias"], strict=True):
            limit = np.abs(wanted).max()
            all_clear &= clear(wanted, limit, 8, True)
            wanted = np.maximum(rounded(wanted, limit, 8, True) @ kernel + bias.reshape(1, -1), 0)
            limits.append(limit)
    with quantized_inputs(rules, 1.0):
        (got, _), state = scanned(**{RANGES: 0}).apply(variables, x, None, mutable=[RANGES])
    found = state[RANGES]["dense"]["input"]
    assert found.shape == (3,), "a range for each layer of the stack"
    np.testing.assert_allclose(found, limits, rtol=1e-5)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
