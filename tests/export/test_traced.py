"""Functions as graphs: what is written out, evaluated and left out, and sizes that stay open."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.traced import Codes, Constant, Graph, OpenAxes, Size, Value, trace
from ab_jax.products import ActivationRules, initial_ranges
from ab_jax.quantized import BinaryCoded, Quantized
from tests.export.exported_networks import coded, drawn

BATCH = OpenAxes.of(["batch"], {})
BOTH = OpenAxes.of(["batch", "length"], {})


def primitives(graph: Graph) -> list[str]:
    return [operation.primitive for operation in graph.operations]


# Sizes


@pytest.mark.parametrize(
    ("size", "terms"),
    [
        (lambda b, n: b, {("batch",): 1}),
        (lambda b, n: 12 * n, {("length",): 12}),
        (lambda b, n: 3 * b * n, {("batch", "length"): 3}),
        (lambda b, n: n * n, {("length", "length"): 1}),
        (lambda b, n: b * (n + 1), {("batch", "length"): 1, ("batch",): 1}),
        (lambda b, n: b * n - 2 * b + 5, {("batch", "length"): 1, ("batch",): -2, (): 5}),
        (lambda b, n: n - 9, {("length",): 1, (): -9}),
        (lambda b, n: 5 - b, {("batch",): -1, (): 5}),
    ],
)
def test_a_size_is_known_by_its_values(size: Any, terms: Any) -> None:
    values = [size(corner["batch"], corner["length"]) for corner in BOTH.corners]
    assert Size(tuple(values), BOTH).terms == terms


@pytest.mark.parametrize(
    "size", [lambda b: (b + 1) // 2, lambda b: b * b + 3 * b, lambda b: 2 * b * b + 1]
)
def test_other_sizes_are_refused_with_their_values(size: Any) -> None:
    found = Size(tuple(size(corner["batch"]) for corner in BATCH.corners), BATCH)
    with pytest.raises(ValueError, match=rf"{size(7)} at batch=7, {size(12)} at batch=12"):
        _ = found.terms


@pytest.mark.parametrize("stride", [2, 3, 4, 6, 8, 9])
def test_what_strides_leave_over_shows(stride: int) -> None:
    axes = OpenAxes.of(["a", "b", "c", "d"], {})
    for low, high in axes.sizes:
        assert low % stride != high % stride


def test_sizes_are_computed_with() -> None:
    b, n = (BOTH.size([corner[name] for corner in BOTH.corners]) for name in BOTH.names)
    assert (2 * b * n - n + 1).terms == {("batch", "length"): 2, ("length",): -1, (): 1}
    assert b - b == 0
    assert (b + n) - n == b
    assert 7 - b != 7
    assert str(3 * b * n) == "3*batch*length"


def test_open_axes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="no open axis 'width'"):
        OpenAxes.of(["batch"], {"width": (8, 16)})
    with pytest.raises(ValueError, match="two different positive sizes, not at"):
        OpenAxes.of(["batch"], {"batch": (8, 8)})
    wrong: Any = {"batch": 8}
    with pytest.raises(ValueError, match="two different positive sizes, not at 8"):
        OpenAxes.of(["batch"], wrong)
    with pytest.raises(ValueError, match="At most 4"):
        OpenAxes.of(list("abcde"), {})


# Graphs


def test_calls_are_written_out_and_what_depends_on_no_input_is_evaluated() -> None:
    @jax.custom_vjp
    def halved(x: jax.Array) -> jax.Array:
        return x / 2

    halved.defvjp(lambda x: (x / 2, None), lambda _, g: (g,))

    def f(params: Any, x: jax.Array) -> Any:
        scale = jnp.exp(params["log"]) * jnp.arange(3.0)  # no input
        _ = jnp.sin(x)  # no output
        return jax.checkpoint(jax.jit(lambda x: halved(jax.nn.relu(x)) * scale[None]))(x)

    params = {"log": np.float32(2.0)}
    graph = trace(f, params, jnp.ones((2, 3))).graph
    assert primitives(graph) == ["max", "div", "mul"]
    (constant,) = [x for x in graph.operations[-1].inputs if isinstance(x, Constant)]
    np.testing.assert_allclose(constant.array, [np.exp(2) * np.arange(3.0)], rtol=1e-6)
    (x,) = graph.inputs
    assert str(x.shape[0]) == "batch"
    assert x.shape[1] == 3
    line = f.__code__.co_firstlineno + 3
    assert graph.operations[-1].line == f"{__file__}:{line}"
    assert all(op.line.startswith(f"{__file__}:") for op in graph.operations)


def test_numbers_and_ranges_follow_open_axes() -> None:
    f = lambda _, x: x.mean(0) + jnp.arange(x.shape[0]).sum()
    graph = trace(f, {}, jnp.ones((2, 3))).graph
    assert "size" in primitives(graph)
    assert "iota" in primitives(graph)
    (size,) = [op.params["size"] for op in graph.operations if op.primitive == "size"]
    assert size.terms == {("batch",): 1}


def test_scans_over_layers_and_short_ones_are_unrolled_and_long_ones_are_not() -> None:
    def f(params: Any, x: jax.Array, steps: jax.Array) -> Any:
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x) * w[None], None), x, params["layers"])[0]
        return jax.lax.scan(lambda x, s: (x + s, x), x, steps)

    params = {"layers": jnp.ones((12, 3))}
    closed = ({0: "batch"}, None)
    short = trace(f, params, jnp.ones((2, 3)), jnp.ones((4, 1, 1)), open_axes=closed).graph
    assert primitives(short).count("tanh") == 12
    assert "scan" not in primitives(short)
    long = trace(f, params, jnp.ones((2, 3)), jnp.ones((9, 1, 1)), open_axes=closed).graph
    assert primitives(long).count("tanh") == 12
    (scan,) = [op for op in long.operations if op.primitive == "scan"]
    assert primitives(scan.params["body"]) == ["add"]
    assert scan.params["length"] == 9
    unrolled = trace(
        f, params, jnp.ones((2, 3)), jnp.ones((9, 1, 1)), open_axes=closed, longest_unrolled=9
    ).graph
    assert "scan" not in primitives(unrolled)


def test_a_branch_that_is_known_is_taken() -> None:
    def f(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.cond(params["flag"] > 0, jnp.sin, jnp.cos, x)

    assert primitives(trace(f, {"flag": jnp.ones(())}, jnp.ones(3)).graph) == ["sin"]
    assert primitives(trace(f, {"flag": -jnp.ones(())}, jnp.ones(3)).graph) == ["cos"]


def test_open_axes_by_input_and_by_leaf() -> None:
    f = lambda _, x, tree: (x @ tree["a"], tree["b"])
    inputs = jnp.ones((2, 4)), {"a": jnp.ones((4, 5)), "b": jnp.ones((3,))}
    traced = trace(f, {}, *inputs, open_axes=({0: "rows", 1: "sum"}, {"a": {0: "sum"}, "b": None}))
    shapes = [[str(size) for size in value.shape] for value in traced.graph.inputs]
    assert shapes == [["rows", "sum"], ["sum", "5"], ["3"]]
    assert traced.inputs == ("0", "1/a", "1/b")
    assert traced.outputs == ("0", "1")
    assert [str(size) for size in traced.graph.outputs[0].shape] == ["rows", "5"]


@pytest.mark.parametrize("binary", [False, True])
def test_codes_stand_for_what_they_do_elsewhere(binary: bool, rng: np.random.Generator) -> None:
    """Bit for bit, moved or not; several scales a code, groups and zero points too."""
    if binary:
        codes = (rng.integers(0, 8, (6, 4)) * 2 - 7).astype(np.int8)
        leaf: Quantized = BinaryCoded(codes, drawn(rng, 2, 4, 3), None, 3, "float32")
    else:
        codes = rng.integers(-8, 8, (6, 4)).astype(np.int8)
        zero = rng.integers(-8, 8, (3, 4)).astype(np.int8)
        leaf = Quantized(codes, drawn(rng, 3, 4), zero, 4, "float32")
    leaf = jax.tree.map(jnp.asarray, leaf)

    def f(params: Any, x: jax.Array) -> Any:
        return params["w"], params["w"].T[1:, ::2].reshape(3, 3)

    graph = trace(f, {"w": leaf}, jnp.ones(2)).graph
    assert not graph.operations
    dense = ab.dequantize(leaf)
    for found, wanted in zip(graph.outputs, f({"w": dense}, None), strict=True):
        assert isinstance(found, Codes)
        assert found.path == "w"
        np.testing.assert_array_equal(found.values(), wanted)


def test_each_quantized_operand_is_one_operation_with_its_quantizer(
    rng: np.random.Generator,
) -> None:
    """Those of layers of a scan each with the range of their layer."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
        return x @ params["head"]

    params = {"layers": drawn(rng, 3, 4, 4), "head": drawn(rng, 4, 2)}
    quantizers = {"layers": ActivationQuantizer(bits=4), "head": ActivationQuantizer(bits=8)}
    rules = ActivationRules(list(quantizers.items()))
    ranges = initial_ranges(f, rules, params, jnp.ones((2, 4)))
    ranges = {
        "layers": ranges["layers"]._replace(limit=jnp.arange(1.0, 4.0)),
        "head": ranges["head"]._replace(limit=jnp.float32(9)),
    }
    graph = trace(f, params, jnp.ones((2, 4)), rules=rules, ranges=ranges).graph
    steps = ["quantize", "dot_general", "tanh"] * 3 + ["quantize", "dot_general"]
    assert primitives(graph) == steps
    found = [op for op in graph.operations if op.primitive == "quantize"]
    assert [op.params["quantizer"].bits for op in found] == [4, 4, 4, 8]
    assert [float(op.inputs[1].array) for op in found] == [1, 2, 3, 9]
    unmeasured = initial_ranges(f, rules, params, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="never measured"):
        trace(f, params, jnp.ones((2, 4)), rules=rules, ranges=unmeasured)
    with pytest.raises(ValueError, match="no range for the input of head"):
        trace(f, params, jnp.ones((2, 4)), rules=rules, ranges={"layers": ranges["layers"]})
    with pytest.raises(ValueError, match="no rules"):
        trace(f, params, jnp.ones((2, 4)), ranges=ranges)


def test_what_open_axes_cannot_say_is_refused_with_its_line() -> None:
    x = jnp.ones((2, 3))

    def outside(_: Any, x: jax.Array) -> jax.Array:
        return x * np.arange(x.shape[0], dtype=np.float32)[:, None]

    with pytest.raises(ValueError, match="made outside of JAX by the size of an open axis"):
        trace(outside, {}, x)

    def other_steps(_: Any, x: jax.Array) -> jax.Array:
        return jnp.sin(x) if x.shape[0] > 8 else x

    with pytest.raises(ValueError, match="other steps at other sizes"):
        trace(other_steps, {}, x)

    def no_whole_number(_: Any, x: jax.Array) -> jax.Array:
        return x * (1 / x.shape[0])

    line = no_whole_number.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=f"no whole one, at {__file__}:{line}"):
        trace(no_whole_number, {}, x)
    with pytest.raises(ValueError, match="open_axes has 2 entries for 1 inputs"):
        trace(outside, {}, x, open_axes=(None, None))
    for wrong in ("batch", {0: 3}, {"batch": 0}):
        with pytest.raises(ValueError, match="where an axis is given its name"):
            trace(outside, {}, x, open_axes=(wrong,))
    with pytest.raises(ValueError, match="no axis 2 to be open"):
        trace(outside, {}, x, open_axes=({2: "batch"},))
    closed = trace(outside, {}, x, open_axes=(None,)).graph
    assert closed.outputs[0].shape == (2, 3)


def test_values_have_shapes_and_dtypes(rng: np.random.Generator) -> None:
    graph = trace(
        lambda p, x: (x @ p["w"]) > 0, coded({"w": drawn(rng, 3, 2)}, 8), jnp.ones((2, 3))
    )
    product, compared = graph.graph.operations
    assert product.path == "w"
    assert isinstance(product.inputs[0], Value)
    assert [str(size) for size in compared.outputs[0].shape] == ["batch", "2"]
    assert compared.outputs[0].dtype == np.bool_
