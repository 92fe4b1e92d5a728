"""Graphs made simpler: scales and shifts in weights, inputs quantized early, the same results."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.inference import inference
from ab_jax.export.traced import Codes, Constant, Graph, TracedFunction, trace, weighted_product
from ab_jax.export.traced.computing import evaluate
from ab_jax.export.traced.early_codes import quantize_early
from ab_jax.products import ActivationRules
from ab_jax.quantized import BinaryCoded, Quantized
from tests.export.exported_networks import coded, drawn
from tests.export.small_networks import CASES, make
from tests.fast_compilation import compiled


def primitives(graph: Graph) -> list[str]:
    return [operation.primitive for operation in graph.operations]


def traced(f: Any, params: Any, *inputs: Any, **options: Any) -> TracedFunction:
    return trace(f, params, *inputs, **options)


def weights(graph: Graph) -> list[Any]:
    products = map(weighted_product, graph.operations)
    return [product.weight for product in products if product is not None]


# Scales and shifts


def of_kind(kind: str, w: np.ndarray, rng: np.random.Generator) -> Any:
    """A weight of three axes as floats, codes, codes with zero points, or signs with scales."""
    if kind == "floats":
        return w
    if kind == "codes":
        return coded({"w": w}, 8)["w"]
    if kind == "zero points":
        return coded({"w": w}, 4, zero_point=True)["w"]
    codes = (rng.integers(0, 4, w.shape) * 2 - 3).astype(np.int8)
    scale = rng.uniform(0.1, 1, (1, 1, w.shape[-1], 2)).astype(np.float32)
    return BinaryCoded(codes, scale, None, 2, "float32")


@pytest.mark.parametrize("kind", ["floats", "codes", "zero points", "signs"])
def test_what_follows_a_product_channel_by_channel_becomes_its_weight_and_a_bias(
    kind: str, rng: np.random.Generator
) -> None:
    """A chain of every operation that is folded, in float64 beside it."""
    w = of_kind(kind, drawn(rng, 5, 3, 4), rng)
    a, b, d = (rng.uniform(0.5, 2, 4).astype(np.float32) for _ in range(3))
    signs = np.float32([1, -1, 1, -1])
    c = drawn(rng, 4)

    def f(params: Any, x: Any) -> Any:
        y = jnp.einsum("bi,ijk->bjk", x, params)
        y = (y - c[None, None]) * (a * signs)[None, None] + b[None, None]
        return -(0.5 - y / d[None, None]) * 3

    x = drawn(rng, 6, 5)
    whole = traced(f, w, x)
    simple = whole.simplified()
    assert primitives(whole.graph) != primitives(simple.graph)
    assert primitives(simple.graph) == ["dot_general", "add"]
    dense = w.dequantize() if isinstance(w, Quantized) else w
    y = np.einsum("bi,ijk->bjk", x.astype(np.float64), np.asarray(dense, np.float64))
    y = (y - c) * (a * signs).astype(np.float64) + b
    wanted = -(0.5 - y / d.astype(np.float64)) * 3
    for graph in (whole, simple):
        np.testing.assert_allclose(evaluate(graph, x), wanted, rtol=1e-5, atol=1e-5)
    (weight,) = weights(simple.graph)
    if kind in ("codes", "zero points"):
        assert (weight.scales[0] > 0).all()
        turned = ~w.codes if kind == "zero points" else -w.codes
        np.testing.assert_array_equal(weight.codes, np.where(signs < 0, turned, w.codes))


def test_what_is_no_number_a_channel_or_seen_elsewhere_stays(rng: np.random.Generator) -> None:
    w = coded({"w": drawn(rng, 5, 4)}, 8)["w"]
    x, row = drawn(rng, 4, 5), np.arange(4, dtype=np.float32)
    for f in (
        lambda w, x: (x @ w) * row[:, None],  # a number a row
        lambda w, x: (lambda y: (y * 2, y))(x @ w),  # an output
        lambda w, x: (lambda y: y * 2 + jnp.exp(y))(x @ w),  # two users
        lambda w, x: 1 / (x @ w),
        lambda w, x: (x @ w) * jnp.sum(x),  # depends on the input
    ):
        graph = traced(f, w, x, open_axes=[None])
        kept = graph.simplified().graph
        assert primitives(kept) == primitives(graph.graph)
        np.testing.assert_array_equal(weights(kept)[0].scales[0], weights(graph.graph)[0].scales[0])


def test_a_code_without_a_negative_is_not_negated(rng: np.random.Generator) -> None:
    """-8 has no counterpart in 4 bits: the factor stays behind the product."""
    w = Quantized(np.int8([[-8, 3], [1, 2]]), np.ones((1, 2), np.float32), None, 4, "float32")
    x = drawn(rng, 3, 2)
    simple = traced(lambda w, x: -(x @ w) * 2, w, x).simplified()
    assert primitives(simple.graph) == ["dot_general", "neg", "mul"]
    np.testing.assert_allclose(evaluate(simple, x), -2 * (x @ np.asarray(w.codes)), rtol=1e-6)
    fits = traced(lambda w, x: (x @ w) * np.float32([[2, -2]]), w, x).simplified()
    assert primitives(fits.graph) == ["dot_general"]


def test_an_embedding_that_gives_logits_too_stays_one_array(rng: np.random.Generator) -> None:
    params = coded({"embedding": drawn(rng, 16, 4)}, 8, axis=0)
    f = lambda p, t: (p["embedding"][t] @ p["embedding"].T) / 30
    tokens = rng.integers(0, 16, (3,)).astype(np.int32)
    simple = traced(f, params, tokens).simplified()
    assert "div" in primitives(simple.graph)
    dense = np.asarray(ab.dequantize(params)["embedding"], np.float64)
    np.testing.assert_allclose(
        evaluate(simple, tokens), dense[tokens] @ dense.T / 30, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_a_network_s_graph_is_the_network(name: str, rng: np.random.Generator) -> None:
    """As traced, and simplified; batch norms behind layers are a part of these."""
    model, variables, shape = make(name, rng)
    images = jnp.asarray(rng.normal(size=(6, *shape)), jnp.float32)
    net = inference(model, variables)
    graph = trace(net.function, net.params, images, rules=net.rules, ranges=net.ranges)
    values = ab.dequantize(variables)
    wanted = compiled(lambda x: model.apply(values, x, train=False), images)
    largest = np.abs(wanted).max()
    for of in (graph, graph.simplified()):
        found = compiled(lambda x, of=of: evaluate(of, x), images)
        # Rounding may move a value from one code to the next.
        differences = np.abs(found - wanted).max(axis=1)
        assert np.mean(differences < 1e-5 * largest) > 0.5
        assert differences.max() < 0.1 * largest
    divided = [o for o in graph.simplified().graph.operations if o.primitive in ("sub", "rsqrt")]
    assert len(divided) < len([o for o in graph.graph.operations if o.primitive == "sub"])


# Quantization


def convolved(x: Any, w: Any, stride: int = 1, groups: int = 1) -> Any:
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def pooled(params: Any, x: Any) -> Any:
    """A stem with a pool, whose output two layers take."""
    x = jax.nn.relu(convolved(x, params["stem"]) + params["bias"])
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
    y = jnp.minimum(jax.nn.relu(convolved(x, params["depthwise"], 2, 8)), 6)
    return convolved(y, params["last"]) + convolved(x, params["shortcut"], 2)


def pooled_rules(limits: tuple[float, float]) -> ActivationRules:
    codes = lambda limit: ActivationQuantizer(bits=3, signed=False, limit=limit)
    return ActivationRules(
        [
            ("stem", ActivationQuantizer(bits=4, signed=True, limit=2.0)),
            ("depthwise", codes(limits[0])),
            ("shortcut", codes(limits[1])),
            ("last", codes(1.5)),
        ]
    )


def pooled_params(rng: np.random.Generator) -> Any:
    shapes = {"stem": (3, 3, 3, 8), "depthwise": (3, 3, 1, 8)}
    shapes |= {"shortcut": (1, 1, 8, 12), "last": (1, 1, 8, 12)}
    params = {name: drawn(rng, *shape) / np.float32(3) for name, shape in shapes.items()}
    return params | {"bias": drawn(rng, 1, 1, 1, 8) / np.float32(5)}


@pytest.mark.parametrize(
    ("limits", "order"),
    [
        ((1.0, 1.0), "codes conv add codes pad pool conv codes conv conv add"),
        ((1.0, 1.1), "codes conv add max pad pool codes conv codes conv codes conv add"),
        ((1.0, 7.0), "codes conv add max pad pool codes conv codes conv codes conv add"),
    ],
)
def test_codes_are_taken_early_where_that_changes_no_bit(
    limits: tuple[float, float], order: str, rng: np.random.Generator
) -> None:
    params, x = pooled_params(rng), 3 * drawn(rng, 4, 12, 12, 3)
    graph = trace(pooled, params, x, rules=pooled_rules(limits), ranges={})
    early = quantize_early(graph.graph)
    short = {"quantize": "codes", "conv_general_dilated": "conv", "reduce_window_max": "pool"}
    assert [short.get(name, name) for name in primitives(early)] == order.split()
    moved = TracedFunction(early, graph.inputs, graph.outputs, graph.structure)
    wanted = evaluate(graph, x)
    assert np.ptp(wanted) > 0
    np.testing.assert_array_equal(evaluate(moved, x), wanted)


def test_a_clip_below_the_limit_and_signed_codes_stay_behind(rng: np.random.Generator) -> None:
    x = 3 * drawn(rng, 5, 4)
    params = {"a": drawn(rng, 4, 4), "b": drawn(rng, 4, 3)}
    f = lambda p, x: jnp.clip(x @ p["a"], 0, 1.0) @ p["b"]
    for signed, limit, clipped in ((False, 1.0, False), (False, 2.0, True), (True, 1.0, True)):
        quantizer = ActivationQuantizer(bits=4, signed=signed, limit=limit)
        rules = ActivationRules([("b", quantizer), ("a", None)])
        graph = trace(f, params, x, rules=rules, ranges={})
        simple = graph.simplified()
        assert bool({"max", "min", "clamp"} & set(primitives(simple.graph))) == clipped
        np.testing.assert_array_equal(evaluate(simple, x), evaluate(graph, x))


def test_an_unknown_kind_of_operand_is_no_number(rng: np.random.Generator) -> None:
    """A bias that is codes stays an operation of its own."""
    params = {"w": drawn(rng, 4, 3), "b": coded({"b": drawn(rng, 1, 3)}, 8)["b"]}
    graph = trace(lambda p, x: (x @ p["w"]) * 2 + p["b"], params, drawn(rng, 2, 4)).simplified()
    assert primitives(graph.graph)[-1] == "add"
    kinds = [type(x) for x in graph.graph.operations[-1].inputs]
    assert Codes in kinds
    assert Constant not in kinds
