"""Softmax, layer norm and GELU are found however they are written, and nothing else is."""

import json
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from ai_edge_litert import schema_py_generated as schema
from flax import nnx

import ab_jax as ab
from ab_jax.export.litert import function_to_litert
from ab_jax.export.onnx import function_to_onnx
from tests.export.litert_answers import File, answers_by_name
from tests.export.onnx_answers import answers, check_close

SHAPE = (3, 5, 6)
Function = Callable[[Any, jax.Array], jax.Array]


def _linen(module: nn.Module, rng: np.random.Generator) -> tuple[Function, Any]:
    params = module.init(jax.random.key(0), np.ones(SHAPE, np.float32))
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    return lambda params, x: module.apply(params, x), params


def _nnx(rng: np.random.Generator) -> tuple[Function, Any]:
    graph, state = nnx.split(nnx.LayerNorm(SHAPE[-1], rngs=nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


def _equinox(rng: np.random.Generator) -> tuple[Function, Any]:
    norm = eqx.nn.LayerNorm(SHAPE[-1], eps=1e-3)
    arrays, rest = eqx.partition(norm, eqx.is_array)
    return lambda arrays, x: jax.vmap(jax.vmap(eqx.combine(arrays, rest)))(x), arrays


def _by_hand(rng: np.random.Generator) -> tuple[Function, Any]:
    def f(params: Any, x: jax.Array) -> jax.Array:
        centered = x - x.mean(-1, keepdims=True)
        deviation = jnp.sqrt((centered * centered).mean(-1, keepdims=True) + 1e-5)
        return params[0] * (centered / deviation) - params[1]

    return f, rng.normal(size=(2, 1, 1, SHAPE[-1])).astype(np.float32)


LAYER_NORMS: dict[str, Callable[[np.random.Generator], tuple[Function, Any]]] = {
    "linen": lambda rng: _linen(nn.LayerNorm(), rng),
    "linen, slow variance": lambda rng: _linen(nn.LayerNorm(use_fast_variance=False), rng),
    "linen, no bias": lambda rng: _linen(nn.LayerNorm(use_bias=False, epsilon=0.01), rng),
    "nnx": _nnx,
    "equinox": _equinox,
    "by hand": _by_hand,
}
OTHERS: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
    "softmax": ("Softmax", jax.nn.softmax),
    "softmax, an inner axis": ("Softmax", lambda x: jax.nn.softmax(x, 1)),
    "softmax by hand": (
        "Softmax",
        lambda x: (e := jnp.exp(x - x.max(-1, keepdims=True))) / e.sum(-1, keepdims=True),
    ),
    "log softmax": ("LogSoftmax", jax.nn.log_softmax),
    "gelu": ("Gelu", lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu by erf": ("Gelu", lambda x: x * (1 + jax.lax.erf(x / np.sqrt(2).astype(np.float32))) / 2),
    "gelu by tanh": ("Gelu", jax.nn.gelu),
}
UNLIKE: dict[str, Callable[[jax.Array], Any]] = {
    "two axes": lambda x: jax.nn.softmax(x, (1, 2)),
    "another temperature inside": lambda x: jnp.exp(x) / jnp.exp(2 * x).sum(-1, keepdims=True),
    "steeper gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x / 1.4)),
    "another tanh": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.05 * x**3))),
    "root mean square": lambda x: x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6),
    "norm over an inner axis": lambda x: nn.LayerNorm(
        reduction_axes=1, use_bias=False, use_scale=False
    ).apply({}, x),
    "unbiased variance": lambda x: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-6)
    ),
    "an inner value leaves": lambda x: (e := jnp.exp(x)) / e.sum(-1, keepdims=True) + 0 * e.sum(),
}

# What is another function where numbers are large, small or masked.
ELSEWHERE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "rows that are masked give 0": lambda x: (
        (e := jnp.exp(x - jnp.maximum(x.max(-1, keepdims=True), -1e30)))
        / jnp.maximum(e.sum(-1, keepdims=True), 1e-9)
    ),
    "logarithm of a softmax that is never 0": lambda x: jnp.log(jax.nn.softmax(x) + 1e-12),
    "log softmax from -100": lambda x: jnp.maximum(jax.nn.log_softmax(x), -100),
    "softmax from a number": lambda x: (
        (e := jnp.exp(jnp.maximum(x - x.max(-1, keepdims=True), -30))) / e.sum(-1, keepdims=True)
    ),
    "gelu and a line": lambda x: jax.nn.gelu(x) + jnp.maximum(x - 50, 0),
}


def operators(f: Function, params: Any, x: np.ndarray) -> list[str]:
    """Operators of the file, whose answers are checked on another batch."""
    model = function_to_onnx(f, params, x[:2])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    wanted = np.asarray(f(params, x))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6 * np.abs(wanted).max())
    return [node.op_type for node in model.graph.node if node.op_type != "Identity"]


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norms_are_one_operator(rng: np.random.Generator, name: str) -> None:
    f, params = LAYER_NORMS[name](rng)
    x = rng.normal(1, 2, SHAPE).astype(np.float32)
    assert operators(f, params, x) == ["LayerNormalization"]


@pytest.mark.parametrize("name", OTHERS)
def test_functions_without_parameters_are_one_operator(rng: np.random.Generator, name: str) -> None:
    operator, f = OTHERS[name]
    x = rng.normal(0, 2, SHAPE).astype(np.float32)
    assert operators(lambda _, x: f(x), {}, x) == [operator]


@pytest.mark.parametrize("name", OTHERS)
def test_litert_has_operators_for_them_too(rng: np.random.Generator, name: str) -> None:
    operator, f = OTHERS[name]
    x = rng.normal(0, 2, SHAPE).astype(np.float32)
    data = function_to_litert(lambda _, x: f(x), {}, x, input_names=["x"], output_names=["y"])
    named = {"Softmax": "SOFTMAX", "LogSoftmax": "LOG_SOFTMAX", "Gelu": "GELU"}[operator]
    used = {code.builtinCode for code in File(data).model.operatorCodes}
    assert getattr(schema.BuiltinOperator, named) in used
    assert used <= {getattr(schema.BuiltinOperator, n) for n in (named, "TRANSPOSE", "RESHAPE")}
    wanted = np.asarray(f(x))
    for answer in answers_by_name(data, {"x": x}).values():
        np.testing.assert_allclose(answer, wanted, rtol=1e-5, atol=4e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("name", UNLIKE)
def test_what_computes_something_else_stays(rng: np.random.Generator, name: str) -> None:
    x = rng.normal(0, 2, SHAPE).astype(np.float32)
    found = operators(lambda _, x: UNLIKE[name](x), {}, x)
    assert not {"Softmax", "LogSoftmax", "Gelu", "LayerNormalization"} & set(found)


def test_a_part_of_which_an_inner_value_is_an_output_stays(rng: np.random.Generator) -> None:
    def f(_: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jnp.exp(x).sum(-1, keepdims=True)
        return jnp.exp(x) / total, total

    x = rng.normal(size=SHAPE).astype(np.float32)
    model = function_to_onnx(f, {}, x)
    assert "Softmax" not in [node.op_type for node in model.graph.node]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for found, wanted in zip(session.run(None, {"input0": x}), f({}, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_precision_of_large_means_is_not_lost(rng: np.random.Generator) -> None:
    x = (rng.normal(size=(3, 5, 300)) + 100).astype(np.float32)
    f, params = _linen(nn.LayerNorm(use_fast_variance=False, use_bias=False, use_scale=False), rng)
    model = function_to_onnx(f, params, x)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_differs_far_out_or_where_masked_is_computed_as_written(
    rng: np.random.Generator, name: str
) -> None:
    x = rng.normal(0, 2, SHAPE).astype(np.float32)
    x[0] *= 200
    if name.startswith("rows"):
        x[1, 2], x[2, :, 3:] = -np.inf, -np.inf
    model = function_to_onnx(lambda _, x: ELSEWHERE[name](x), {}, x)
    check_close(answers(model, x), ELSEWHERE[name](x))


def test_a_large_bias_of_one_channel_hides_no_other(rng: np.random.Generator) -> None:
    bias = np.zeros((1, 1, SHAPE[-1]), np.float32)
    bias[..., 0] = 1e6

    def root_mean_square(bias: jax.Array, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) + bias

    x = rng.normal(2, 1, SHAPE).astype(np.float32)
    (found,) = answers(function_to_onnx(root_mean_square, bias, x), x)
    np.testing.assert_allclose(found[..., 1:], root_mean_square(bias, x)[..., 1:], atol=1e-5)


@pytest.mark.parametrize("quantizer", [ab.Uniform(bits=8), ab.LeastSquaresBinary(bits=2)])
def test_scales_that_are_codes_stay_codes(rng: np.random.Generator, quantizer: Any) -> None:
    f, params = _linen(nn.LayerNorm(), rng)
    codes = ab.quantize(params, ab.Rules([(r".*", quantizer)]))
    x = rng.normal(0, 2, SHAPE).astype(np.float32)
    model = function_to_onnx(f, codes, x)
    check_close(answers(model, x), f(ab.dequantize(codes), x))
    (told,) = (entry.value for entry in model.metadata_props if entry.key == "quantization")
    weights = json.loads(told)["weights"]
    assert weights == {f"params/{name}": quantizer.bits for name in ("scale", "bias")}


def test_two_parts_of_one_value_are_both_found(rng: np.random.Generator) -> None:
    f, params = zip(*(_linen(nn.LayerNorm(), rng) for _ in range(2)), strict=True)
    x = rng.normal(1, 2, SHAPE).astype(np.float32)
    found = operators(lambda params, x: f[0](params[0], x) * f[1](params[1], x) - x, params, x)
    assert found == ["LayerNormalization", "LayerNormalization", "Mul", "Sub"]


def test_over_an_axis_traced_at_size_1_another_function_shows(rng: np.random.Generator) -> None:
    def f(_: Any, x: jax.Array) -> jax.Array:
        return jnp.exp(x) / jnp.exp(x).max(0, keepdims=True)

    x = rng.normal(size=SHAPE).astype(np.float32)
    check_close(answers(function_to_onnx(f, {}, x, sizes={"batch": (1, 2)}), x), f({}, x))
    x = rng.normal(size=(8, 3)).astype(np.float32)
    check_close(answers(function_to_onnx(lambda _, x: f({}, x[6:]), {}, x), x), f({}, x[6:]))


def test_sizes_of_no_simple_terms_are_no_obstacle(rng: np.random.Generator) -> None:
    f, params = _linen(nn.LayerNorm(), rng)
    x = rng.normal(size=(2, 9, SHAPE[-1])).astype(np.float32)
    model = function_to_onnx(
        lambda params, x: f(params, x[:, ::2]), params, x, open_axes=({0: "batch", 1: "length"},)
    )
    assert "LayerNormalization" in [node.op_type for node in model.graph.node]
    for length in (8, 9):
        check_close(answers(model, x[:, :length]), f(params, x[:, :length:2]))
