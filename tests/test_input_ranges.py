"""Ranges over the calls of a pass: shared layers, loops, stacks, and what is not finite."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.activations import ActivationQuantizer
from ab_jax.linen import (
    NOT_FINITE,
    RANGES,
    ActivationRules,
    InputQuantizer,
    QuantizedInputs,
    initial_ranges,
    keep_input,
    layer_paths,
    quantized_inputs,
)

# What it tests goes with the next release, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*goes with the next release:FutureWarning")

MOMENTUM = 0.75
QUANTIZER = ActivationQuantizer(bits=8, signed=True, momentum=MOMENTUM)
RULES = ActivationRules([(".*", QUANTIZER)])


def after(start: float, largest: float) -> float:
    """The range of a pass, written out."""
    return largest if start == 0 else MOMENTUM * start + (1 - MOMENTUM) * largest


class Twice(nn.Module):
    """One layer, called twice: the second time on what it gave."""

    quantize_input: InputQuantizer = keep_input
    remat: bool = False

    def setup(self) -> None:
        self.dense = (nn.remat(nn.Dense) if self.remat else nn.Dense)(4, use_bias=False)

    def once(self, x: Any) -> Any:
        return self.dense(self.quantize_input(self, "dense", x, 0.0))

    def __call__(self, x: Any) -> Any:
        return self.once(self.once(x))


def intercepted(model: Twice, method: Any = None) -> Callable[..., Any]:
    def apply(variables: Any, x: Any) -> Any:
        with quantized_inputs(RULES, 0.0):
            return model.apply(variables, x, method=method, mutable=[RANGES, NOT_FINITE])

    return apply


def injected(variables: Any, x: Any) -> Any:
    model = Twice(QuantizedInputs(RULES))
    return model.apply(variables, x, mutable=[RANGES, NOT_FINITE])


def two_methods(model: Twice, x: Any) -> Any:
    return model.once(model.once(x))


@pytest.mark.parametrize(
    "apply",
    [
        intercepted(Twice()),
        intercepted(Twice(remat=True)),
        intercepted(Twice(), two_methods),
        injected,
    ],
    ids=["intercepted", "remat", "two methods", "injected"],
)
@pytest.mark.parametrize("jit", [False, True])
def test_the_range_of_a_pass_is_the_largest_over_its_calls(rng, apply, jit):
    """Of the layer's input, the larger of which comes first in some passes and second in others."""
    kernel = rng.normal(size=(4, 4)).astype(np.float32)
    expected, state = 0.0, {}
    apply = jax.jit(apply) if jit else apply
    for gain in (3.0, 0.1, 10.0):
        x = rng.normal(size=(5, 4)).astype(np.float32)
        scaled = gain * kernel / np.abs(kernel).sum()
        (_, state) = apply({"params": {"dense": {"kernel": scaled}}, **state}, x)
        expected = after(expected, max(np.abs(x).max(), np.abs(x @ scaled).max()))
        np.testing.assert_allclose(jax.tree.leaves(state[RANGES]), [expected], rtol=1e-5)
    assert jax.tree.leaves(state[NOT_FINITE]) == [0]


def test_a_layer_that_grows_its_input_tenfold_ends_with_the_larger_range():
    """Maxima 1 and 10 in every pass: the range is 10, and 10 goes through it unclipped."""
    model, state = Twice(), {}
    params = {"dense": {"kernel": 10 * jnp.eye(4)}}
    for _ in range(5):
        _, state = intercepted(model)({"params": params, **state}, jnp.ones((1, 4)))
    assert float(state[RANGES]["dense"]["input"]) == 10
    with quantized_inputs(RULES, 1.0):
        y = model.apply(
            {"params": params, RANGES: state[RANGES]}, jnp.full((1, 4), 10.0), method="once"
        )
    np.testing.assert_allclose(y, 100, rtol=1e-6)


# Loops


def recurrent(**options: Any) -> nn.RNN:
    return nn.RNN(nn.SimpleCell(4), **options)


def steps_of(params: Any, x: np.ndarray) -> list[np.ndarray]:
    """The states of the cell that its hidden layer sees."""
    cell = jax.tree.map(np.asarray, params["cell"])
    states = [np.zeros((x.shape[0], 4), np.float32)]
    for t in range(x.shape[1]):
        inner = x[:, t] @ cell["i"]["kernel"] + cell["i"]["bias"][None]
        states.append(np.tanh(inner + states[-1] @ cell["h"]["kernel"]))
    return states


def test_a_loop_has_a_range_a_layer_whatever_its_length(rng, key):
    model = recurrent(variable_carry=RANGES)
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    params = model.init(key, x)["params"]
    ranges = initial_ranges(layer_paths(model, x), RULES)

    @jax.jit
    @jax.grad
    def unused(params: Any) -> Any:  # gradients go through what the loop carries
        with quantized_inputs(RULES, 0.5):
            y, _ = model.apply({"params": params, RANGES: ranges}, x, mutable=[RANGES])
        return jnp.sum(y)

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(unused(params)))
    expected = {"i": 0.0, "h": 0.0}
    for length, gain in ((6, 1.0), (3, 4.0), (1, 0.1)):
        x = (gain * rng.normal(size=(2, length, 3))).astype(np.float32)
        with quantized_inputs(RULES, 0.0):
            variables = {"params": params, RANGES: ranges}
            _, state = model.apply(variables, x, mutable=[RANGES, NOT_FINITE])
        ranges = state[RANGES]
        largest = {"i": np.abs(x).max(), "h": np.abs(steps_of(params, x)[:-1]).max()}
        expected = {name: after(expected[name], largest[name]) for name in expected}
        found = {name: float(leaf["input"]) for name, leaf in ranges["cell"].items()}
        assert found == pytest.approx(expected, rel=1e-5)
    assert state[NOT_FINITE] == {"cell": {"h": {"input": 0}, "i": {"input": 0}}}
    # Read alone, by another length.
    reading = recurrent(variable_broadcast=["params", RANGES])
    with quantized_inputs(RULES, 0.0):
        y = reading.apply({"params": params, RANGES: ranges}, x[:, :1])
    np.testing.assert_allclose(y[:, 0], steps_of(params, x[:, :1])[1], rtol=1e-5, atol=1e-6)
    with (
        pytest.raises(ValueError, match=r"cell/i lies in a loop.*variable_broadcast=\['params'"),
        quantized_inputs(RULES, 0.0),
    ):
        model.apply({"params": params, RANGES: ranges}, x)


def test_a_stack_of_loops_has_a_range_a_layer_of_each(rng, key):
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            cell = nn.SimpleCell(4, parent=None)
            return nn.RNN(cell, variable_carry=RANGES, name="loop")(x), None

    stack = nn.scan(
        Loop, variable_axes={"params": 0, RANGES: 0}, split_rngs={"params": True}, length=2
    )
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    params = stack().init(key, x, None)["params"]
    zeros = {"loop": {"cell": {name: {"input": jnp.zeros(2)} for name in ("i", "h")}}}
    with quantized_inputs(RULES, 0.0):
        _, state = stack().apply({"params": params, RANGES: zeros}, x, None, mutable=[RANGES])
    found = state[RANGES]["loop"]["cell"]
    for i in range(2):
        states = steps_of(jax.tree.map(lambda leaf, i=i: leaf[i], params["loop"]), x)
        np.testing.assert_allclose(found["i"]["input"][i], np.abs(x).max(), rtol=1e-5)
        np.testing.assert_allclose(found["h"]["input"][i], np.abs(states[:-1]).max(), rtol=1e-5)
        x = np.stack(states[1:], axis=1)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (
            {"variable_axes": {RANGES: 0}},
            False,
            r"cell/i has a range of shape \(3,\), one for each",
        ),
        ({"variable_carry": RANGES}, False, "cell/i lies in a loop that"),
        (
            {"variable_broadcast": ["params", RANGES]},
            True,
            "cell/. lies in a loop",
        ),
    ],
)
def test_a_loop_that_does_not_carry_its_ranges_is_refused(key, options, given, message):
    x = jnp.ones((2, 3, 3))
    model = recurrent(**options)
    variables = {"params": recurrent().init(key, x)["params"]}
    if given:
        variables[RANGES] = initial_ranges(layer_paths(recurrent(), x), RULES)
    with pytest.raises(ValueError, match=message) as raised, quantized_inputs(RULES, 1.0):
        model.apply(variables, x, mutable=[RANGES])
    assert f"variable_carry='{RANGES}'" in str(raised.value)
    assert "initial_ranges(layer_paths(model" in str(raised.value)


def test_initial_ranges_are_of_the_layers_that_are_measured():
    rules = ActivationRules(
        [
            ("head", None),
            ("a/b", ActivationQuantizer(bits=4, limit=6.0, signed=False)),
            (".*", QUANTIZER),
        ]
    )
    found = initial_ranges(["a/b", "a/c", "head"], rules)
    assert found == {"a": {"c": {"input": 0}}}
    assert initial_ranges([""], RULES) == {"input": 0}, "a model that is a layer itself"
    assert found["a"]["c"]["input"].dtype == jnp.float32


# Nothing quantized


def test_rules_that_meet_no_layer_are_named(key):
    """`OptimizedLSTMCell` multiplies by itself; the cell of layers is quantized."""
    x = jnp.ones((2, 3, 3))
    model = nn.RNN(nn.OptimizedLSTMCell(8))
    params = model.init(key, x)
    rules = ActivationRules([("typo", QUANTIZER)])
    with (
        pytest.raises(ValueError, match=r"Nothing was quantized.*'typo'.*OptimizedLSTMCell"),
        quantized_inputs(rules, 1.0),
    ):
        model.apply(params, x)


def test_a_function_that_was_compiled_before_is_refused(key):
    x = jnp.ones((2, 3))
    params = nn.Dense(4).init(key, x)
    compiled = jax.jit(nn.Dense(4).apply)
    compiled(params, x)
    with (
        pytest.raises(ValueError, match=r"Nothing was called.*'\.\*'.*stand inside the one"),
        quantized_inputs(RULES, 1.0),
    ):
        compiled(params, x)


# Not finite


class One(nn.Module):
    quantize_input: InputQuantizer = keep_input

    @nn.compact
    def __call__(self, x: Any, alpha: Any = 1.0) -> Any:
        return nn.Dense(3, name="dense")(self.quantize_input(self, "dense", x, alpha))


@pytest.mark.parametrize("percentile", [None, 99.0])
@pytest.mark.parametrize("way", ["intercepted", "injected"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_leaves_the_range_alone_and_is_counted(rng, key, value, way, percentile):
    quantizer = ActivationQuantizer(bits=8, percentile=percentile, momentum=MOMENTUM, signed=False)
    rules = ActivationRules([("dense", quantizer)])
    x = np.abs(rng.normal(size=(4, 5))).astype(np.float32)
    broken = x.copy()
    broken[rng.integers(4), rng.integers(5)] = value
    params = One().init(key, x)["params"]

    @jax.jit
    def apply(state: Any, x: Any) -> Any:
        variables = {"params": params, **state}
        if way == "injected":
            model = One(QuantizedInputs(rules))
            return model.apply(variables, x, mutable=[RANGES, NOT_FINITE])[1]
        with quantized_inputs(rules, 1.0):
            return One().apply(variables, x, mutable=[RANGES, NOT_FINITE])[1]

    state: Any = {}
    seen = []
    for batch in (broken, x, broken, x, 2 * x):
        state = apply(state, batch)
        seen.append([float(jax.tree.leaves(state[name])[0]) for name in (RANGES, NOT_FINITE)])
    measured = float(quantizer.measure(jnp.asarray(x)))
    last = after(measured, 2 * measured)
    assert seen[0] == [0, 1]
    assert [count for _, count in seen] == [1, 1, 2, 2, 2]
    assert seen[2][0] == seen[1][0]
    np.testing.assert_allclose([r for r, _ in seen[1:]], [*3 * [measured], last], rtol=1e-6)

    poisoned = jax.tree.map(lambda x: jnp.float32(value), state[RANGES])
    found = apply({RANGES: poisoned}, x)[RANGES]
    np.testing.assert_allclose(jax.tree.leaves(found), measured, rtol=1e-6)


@pytest.mark.parametrize("percentile", [None, 90.0])
def test_one_device_that_is_not_finite_counts_for_all(rng, key, devices, percentile):
    rules = ActivationRules(
        [(".*", ActivationQuantizer(bits=8, percentile=percentile, signed=False))]
    )
    x = rng.normal(size=(4, 2, 5)).astype(np.float32)
    params = One().init(key, x[0])["params"]

    def apply(ranges: Any, x: Any) -> Any:
        with quantized_inputs(rules, 1.0, axis_name="devices"):
            variables = {"params": params, RANGES: ranges}
            return One().apply(variables, x, mutable=[RANGES, NOT_FINITE])[1]

    mapped = jax.pmap(apply, axis_name="devices", in_axes=(None, 0), devices=devices[:4])
    start = {"dense": {"input": jnp.float32(rng.uniform(1, 2))}}
    for broken in range(4):
        batch = x.copy()
        batch[broken, 0, 0] = np.nan
        state = mapped(start, batch)
        np.testing.assert_array_equal(state[RANGES]["dense"]["input"], start["dense"]["input"])
        np.testing.assert_array_equal(state[NOT_FINITE]["dense"]["input"], 1)


def test_a_stack_counts_by_layer(rng, key):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return nn.Dense(4, name="dense")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            axes = {"params": 0, RANGES: 0}
            layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]

    x = rng.normal(size=(2, 4)).astype(np.float32)
    params = Stack().init(key, x)["params"]
    dense = params["layers"]["dense"]
    dense["bias"] = dense["bias"].at[0, 0].set(np.nan)
    with quantized_inputs(RULES, 1.0):
        _, state = Stack().apply({"params": params}, x, mutable=[RANGES, NOT_FINITE])
    state = {name: tree["layers"] for name, tree in state.items()}
    np.testing.assert_array_equal(state[NOT_FINITE]["dense"]["input"], [0, 1, 1])
    found = state[RANGES]["dense"]["input"]
    np.testing.assert_allclose(found, [np.abs(x).max(), 0, 0], rtol=1e-6)


def test_counts_are_of_those_who_ask(rng, key):
    """Initialization and `mutable=[RANGES]` keep the collections that networks have had."""
    x = rng.normal(size=(4, 5)).astype(np.float32)
    model = One(QuantizedInputs(RULES))
    variables = model.init(key, x)
    assert variables.keys() == {"params", RANGES}
    assert model.apply(variables, x, mutable=[RANGES])[1].keys() == {RANGES}
    with quantized_inputs(RULES, 1.0):
        assert One().init(key, x).keys() == {"params", RANGES}
