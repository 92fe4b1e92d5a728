"""Quantized inputs of products: ranges and values against NumPy, and against the Linen layers'."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.linen import RANGES, quantized_inputs
from ab_jax.products import (
    ActivationRules,
    CutOffWarning,
    Range,
    check_ranges,
    find_products,
    initial_ranges,
    measure_ranges,
    quantize_inputs,
)
from tests.products.networks_of_frameworks import NETWORKS, Pictures, drawn
from tests.products.rounded_inputs import clear, rounded

EIGHT = ActivationRules([(".*", ActivationQuantizer(bits=8))])


def two_layers(p, x):
    return jax.nn.relu(x @ p["first"]["kernel"]) @ p["second"]["kernel"]


@pytest.fixture
def params(rng):
    shapes = {"first": (6, 8), "second": (8, 3)}
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }


def test_values_and_ranges_are_those_of_numpy(rng, params):
    all_clear = False
    while not all_clear:
        x = rng.normal(size=(5, 6)).astype(np.float32)
        seen = rounded(x, np.abs(x).max(), 8, True)
        hidden = np.maximum(seen @ np.asarray(params["first"]["kernel"]), 0)
        all_clear = clear(x, np.abs(x).max(), 8, True) and clear(hidden, hidden.max(), 4, False)
    rules = ActivationRules(
        [
            ("first/kernel", ActivationQuantizer(bits=8)),
            ("second/kernel", ActivationQuantizer(bits=4, signed=False)),
        ]
    )
    quantized = jax.jit(quantize_inputs(two_layers, rules), static_argnames="measure")
    ranges = initial_ranges(two_layers, rules, params, x)
    y, ranges = quantized(params, x, ranges=ranges, measure=True)

    wanted = rounded(hidden, hidden.max(), 4, False) @ np.asarray(params["second"]["kernel"])
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ranges["first/kernel"].limit, np.abs(x).max())
    np.testing.assert_allclose(ranges["second/kernel"].limit, hidden.max(), rtol=1e-5)

    _, moved = quantized(params, 2 * x, ranges=ranges, measure=True)
    start = np.abs(x).max()
    np.testing.assert_allclose(moved["first/kernel"].limit, 0.99 * start + 0.02 * start, rtol=1e-6)
    _, kept = quantized(params, 9 * x, ranges=moved)
    assert kept == moved


@pytest.mark.parametrize(
    "quantizer",
    [
        ActivationQuantizer(bits=8),
        ActivationQuantizer(bits=4, percentile=99.0),
        ActivationQuantizer(bits=2, backward="blended"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*goes with the next release:FutureWarning")
def test_it_is_the_linen_layers_path_bit_for_bit_over_three_steps(rng, quantizer):
    model, x = Pictures(), jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    rules = ActivationRules([(".*", quantizer)])
    with quantized_inputs(rules, 0.0):
        variables = model.init(jax.random.key(0), x)
    rest = {"batch_stats": variables["batch_stats"]}

    def forward(p, x):
        return model.apply({"params": p, **rest}, x)

    def by_layer(p, ranges, alpha):
        with quantized_inputs(rules, alpha):
            y, new = model.apply({"params": p, **rest, RANGES: ranges}, x, mutable=[RANGES])
        return jnp.sum(jnp.sin(y)), new[RANGES]

    def by_product(p, ranges, alpha):
        y, ranges = quantize_inputs(forward, rules)(p, x, ranges=ranges, alpha=alpha, measure=True)
        return jnp.sum(jnp.sin(y)), ranges

    one, other = variables[RANGES], initial_ranges(forward, rules, variables["params"], x)
    for alpha in (0.0, 0.5, 1.0):
        (loss, one), gradient = jax.jit(jax.value_and_grad(by_layer, has_aux=True))(
            variables["params"], one, alpha
        )
        (found, other), of_products = jax.jit(jax.value_and_grad(by_product, has_aux=True))(
            variables["params"], other, alpha
        )
        assert found == loss
        jax.tree.map(np.testing.assert_array_equal, of_products, gradient)
        for layer in ("stem", "grouped", "head"):
            assert one[layer]["input"] == other[f"{layer}/kernel"].limit


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_change_little_in_every_network(name):
    f, params, inputs = NETWORKS[name]()
    for rules in (EIGHT, ActivationRules([(".*", TokenQuantizer(bits=8))])):
        ranges = initial_ranges(f, rules, params, *inputs)
        quantized = jax.jit(quantize_inputs(f, rules), static_argnames="measure")
        y, ranges = quantized(params, *inputs, ranges=ranges, measure=True)
        check_ranges(ranges)
        for one, other in zip(jax.tree.leaves(y), jax.tree.leaves(f(params, *inputs)), strict=True):
            # The decoder gives its cache back, of which most is as it was.
            assert 0 < np.max(np.abs(one - other)) < 0.05 * np.max(np.abs(other))
        at_0, _ = quantized(params, *inputs, ranges=ranges, alpha=0.0)
        for one, other in zip(
            jax.tree.leaves(at_0), jax.tree.leaves(f(params, *inputs)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # fused otherwise


def test_a_stack_of_layers_has_a_range_a_layer_and_a_loop_over_time_one():
    f, params, inputs = NETWORKS["plain_scan"]()
    ranges = measure_ranges(f, EIGHT, params, [inputs])
    assert ranges["layers/in"].limit.shape == (3,)
    assert ranges["layers/product#1/product"].limit.shape == (3,)
    assert ranges["head"].limit.shape == ()
    f, params, inputs = NETWORKS["linen_lstm"]()
    ranges = measure_ranges(f, EIGHT, params, [inputs])
    np.testing.assert_allclose(ranges["cell/ii/kernel"].limit, np.abs(inputs[0]).max())
    assert all(found.limit.shape == () for found in ranges.values())


def test_uses_of_one_weight_have_ranges_of_their_own_or_one_by_choice(rng):
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    p = {"w": 2 * jnp.eye(4)}
    f = lambda p, x: (x @ p["w"]) @ p["w"]
    largest = np.abs(x).max()
    ranges = measure_ranges(f, EIGHT, p, [(x,)])
    np.testing.assert_allclose([ranges["w"].limit, ranges["w#1"].limit], [largest, 2 * largest])
    shared = measure_ranges(f, EIGHT, p, [(x,)], one_range_a_weight=True)
    np.testing.assert_allclose(shared["w"].limit, 2 * largest)
    assert shared.keys() == {"w"}


def test_uses_in_a_scan_over_layers_and_outside_of_it_do_not_share_a_range(rng):
    def f(p, x):
        x = x @ p["w"][0]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    p = {"w": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    assert {a: r.limit.shape for a, r in measure_ranges(f, EIGHT, p, [(x,)]).items()} == {
        "w": (),
        "w#1": (3,),
    }
    for refused in (
        lambda: initial_ranges(f, EIGHT, p, x, one_range_a_weight=True),
        lambda: measure_ranges(f, EIGHT, p, [(x,)], one_range_a_weight=True),
        lambda: quantize_inputs(f, EIGHT, one_range_a_weight=True)(p, x, ranges={}),
    ):
        with pytest.raises(ValueError, match=r"uses of w cannot have one range.*\[\].*\[3\]"):
            refused()


def test_each_operand_of_two_activations_has_a_rule_and_a_range():
    f, params, inputs = NETWORKS["plain_scan"]()
    rules = ActivationRules(
        [
            (r".*/product#1/product", ActivationQuantizer(bits=8, signed=False, limit=1.0)),
            (r".*/product", ActivationQuantizer(bits=4)),
            (".*", None),
        ]
    )
    ranges = initial_ranges(f, rules, params, *inputs)
    limits = {address: found.limit.tolist() for address, found in ranges.items()}
    assert limits == {
        "layers/product/left": [0] * 3,
        "layers/product/right": [0] * 3,
        "layers/product#1/product": [1] * 3,
        "layers/product#1/in": [0] * 3,
    }


def test_patterns_may_leave_out_counts_and_operands():
    f, params, inputs = NETWORKS["plain_scan"]()
    eight = ActivationQuantizer(bits=8)
    for pattern, met in {
        "layers/product#1/product": {"layers/product#1/product"},
        "layers/product/product": {"layers/product#1/product"},
        "layers/product#1": {"layers/product#1/product", "layers/product#1/in"},
        "layers/product/left": {"layers/product/left"},
    }.items():
        rules = ActivationRules([(pattern, eight), (".*", None)])
        assert initial_ranges(f, rules, params, *inputs).keys() == met


def test_a_fixed_range_stays_and_is_seen_to_cut_off(rng, params):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    fixed = ActivationQuantizer(bits=8, signed=False, limit=2.0)
    rules = ActivationRules([("first", fixed), (".*", None)])
    with pytest.warns(CutOffWarning, match="input of first/kernel cuts off"):
        ranges = measure_ranges(two_layers, rules, params, [(x,)])
    assert ranges["first/kernel"].limit == 2


@pytest.mark.parametrize("pattern", ["stem", "stem/kernel"])
def test_rules_may_name_a_layer_or_its_weight(pattern):
    f, params, inputs = NETWORKS["linen_convolutions"]()
    rules = ActivationRules([(pattern, ActivationQuantizer(bits=8)), (".*", None)])
    assert list(initial_ranges(f, rules, params, *inputs)) == ["stem/kernel"]


def test_a_scale_a_token_is_over_what_the_product_sums(rng):
    x = rng.normal(size=(2, 5, 6)).astype(np.float32) * 10.0 ** rng.integers(-3, 4, size=(2, 5, 1))
    w = rng.normal(size=(6, 3)).astype(np.float32)
    rules = ActivationRules([(".*", TokenQuantizer(bits=4))])
    f = lambda p, x: jnp.einsum("btd,de->bte", x, p["w"])
    y, _ = quantize_inputs(f, rules)({"w": w}, jnp.asarray(x, jnp.float32), ranges={})
    scale = np.abs(x).max(-1, keepdims=True) / 7
    values = np.round(x / scale) * scale
    # In units of what each sum adds up, since it may come near 0.
    off = np.abs(y - values @ w) / (np.abs(values) @ np.abs(w))
    assert np.max(off) < 1e-5


def test_an_unsigned_range_that_cuts_off_says_where_and_how_much(rng, params):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=False))])
    share = np.maximum(-x, 0).sum() / np.abs(x).sum()
    with pytest.warns(CutOffWarning, match="input of first/kernel cuts off") as told:
        ranges = measure_ranges(two_layers, rules, params, [(x,)])
    (percent,) = re.findall(r"cuts off (\d+\.\d)%", str(told[0].message))
    assert float(percent) == pytest.approx(100 * share, abs=0.0501)
    np.testing.assert_allclose(ranges["first/kernel"].cut, share, rtol=1e-5)
    assert ranges["second/kernel"].cut == 0


def test_ranges_of_several_batches_are_the_largest_maximum_and_the_mean_percentile(rng, params):
    batches = [(rng.normal(size=(4, 6)).astype(np.float32) * k,) for k in (1, 3, 2)]
    found = measure_ranges(two_layers, EIGHT, params, batches)
    largest = max(np.abs(x).max() for (x,) in batches)
    np.testing.assert_allclose(found["first/kernel"].limit, largest)
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, percentile=80))])
    found = measure_ranges(two_layers, rules, params, batches)
    mean = np.mean([np.percentile(np.abs(x), 80, axis=1).mean() for (x,) in batches])
    np.testing.assert_allclose(found["first/kernel"].limit, mean, rtol=0.01)


def test_what_is_not_finite_leaves_a_range_alone_and_is_counted(rng, params):
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    quantized = quantize_inputs(two_layers, EIGHT)
    ranges = initial_ranges(two_layers, EIGHT, params, x)
    _, ranges = quantized(params, x, ranges=ranges, measure=True)
    _, after = quantized(params, x.at[0, 0].set(jnp.nan), ranges=ranges, measure=True)
    assert after["first/kernel"].limit == ranges["first/kernel"].limit
    assert [int(found.not_finite) for found in after.values()] == [1, 1]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_is_counted_under_a_fixed_range_too(rng, params, signed, number):
    x = np.abs(rng.normal(size=(5, 6))).astype(np.float32)
    fixed = ActivationQuantizer(bits=8, signed=signed, limit=2.0)
    rules = ActivationRules([("first", fixed), (".*", None)])
    quantized = quantize_inputs(two_layers, rules)
    start = initial_ranges(two_layers, rules, params, x)
    x[rng.integers(5), rng.integers(6)] = number
    _, ranges = quantized(params, jnp.asarray(x), ranges=start, measure=True)
    assert [float(entry) for entry in ranges["first/kernel"]] == [2, 0, 1]


def test_mistakes_are_named(params):
    x = jnp.ones((2, 6))
    third = ActivationRules([("third", ActivationQuantizer(bits=8)), (".*", None)])
    with pytest.raises(ValueError, match=r"Rule 'third' matches no layer.*first/kernel, second"):
        initial_ranges(two_layers, third, params, x)
    first = ActivationRules([("first", ActivationQuantizer(bits=8))])
    with pytest.raises(ValueError, match="No rule covers second/kernel"):
        initial_ranges(two_layers, first, params, x)
    quantized, start = (
        quantize_inputs(two_layers, EIGHT),
        initial_ranges(two_layers, EIGHT, params, x),
    )
    with pytest.raises(ValueError, match="There is no range for the input of first/kernel"):
        quantized(params, x, ranges={})
    with pytest.raises(
        ValueError, match="range for the input of third, to which no rule gives one"
    ):
        quantized(params, x, ranges=start | {"third": Range.of(0.0)})
    with pytest.raises(ValueError, match="no product whose inputs could be quantized"):
        initial_ranges(lambda p, x: x * p["w"], EIGHT, {"w": 2.0}, x)
    with pytest.raises(ValueError, match=r"range of the input of first/kernel is 0\.0"):
        check_ranges(start)
    with pytest.raises(ValueError, match=r"alpha of the inputs is 1\.5"):
        quantized(params, x, ranges=start, alpha=1.5)
    with pytest.raises(TypeError, match="ActivationQuantizer or TokenQuantizer"):
        ActivationRules([(".*", 8)])
    with pytest.raises(TypeError, match=r"not \['train'\].*functools.partial\(f, train=...\)"):
        quantized(params, x, ranges=start, train=True)


def test_devices_agree_on_the_range(rng, params, devices):
    x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=False))])
    ranges = initial_ranges(two_layers, rules, params, x[0])

    def measured(x):
        quantized = quantize_inputs(two_layers, rules, axis_name="d")
        return quantized(params, x, ranges=ranges, measure=True)[1]

    found = jax.pmap(measured, axis_name="d", devices=devices[:4])(x)
    _, whole = quantize_inputs(two_layers, rules)(
        params, x.reshape(12, 6), ranges=ranges, measure=True
    )
    for path, one in whole.items():
        for i in range(4):
            np.testing.assert_allclose(found[path].limit[i], one.limit, rtol=1e-6)
            np.testing.assert_allclose(found[path].cut[i], one.cut, rtol=1e-5)


def test_in_a_shard_map_a_range_is_that_of_all_parts(rng, devices):
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh(
        (4,), ("d",), devices=devices[:4], axis_types=(jax.sharding.AxisType.Auto,)
    )

    def f(p, x):
        return jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "d"),
            mesh=mesh,
            in_specs=(spec("d"), spec(None, "d")),
            out_specs=spec(),
        )(p["w"], x)

    p = {"w": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    ranges = measure_ranges(f, EIGHT, p, [(x,)])
    np.testing.assert_allclose(ranges["w"].limit, np.abs(x).max())


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=jnp.bfloat16)(x)


def test_half_precision_stays_half_precision(rng):
    model, x = Classifier(), jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    f = lambda p, x: model.apply({"params": p}, x)
    ranges = measure_ranges(f, EIGHT, params, [(x,)])
    y, _ = quantize_inputs(f, EIGHT)(params, x, ranges=ranges)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(float), f(params, x).astype(float), atol=0.1)
    assert drawn(0, 1).dtype == jnp.float32


def test_a_product_in_the_test_of_a_loop_is_told_where_it_could_stand(rng):
    f = lambda p, x: jax.lax.while_loop(lambda x: jnp.sum(x @ p["w"]) > 9, lambda x: x / 2, x)
    p, x = {"w": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)}, jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"w .*test of a while.*\('w', None\).*body of the loop"):
        initial_ranges(f, EIGHT, p, x)

    def in_the_body(p, x):
        step = lambda s: (s[0] / 2, jnp.sum(s[0] @ p["w"]))
        return jax.lax.while_loop(lambda s: s[1] > 9, step, (x, jnp.float32(10)))[0]

    np.testing.assert_allclose(measure_ranges(in_the_body, EIGHT, p, [(x,)])["w"].limit, 1)


def test_attention_with_a_derivative_of_its_own_is_left_or_refused(rng):
    @jax.custom_jvp
    def attended(q, k):
        return q @ k.T

    attended.defjvp(lambda p, t: (attended(*p), t[0] @ p[1].T + p[0] @ t[1].T))
    f = lambda p, x: attended(x @ p["q"], x @ p["k"])
    p = {name: jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for name in "qk"}
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    with pytest.raises(ValueError, match=r"product .*cannot be replaced.*\('product', None\)"):
        initial_ranges(f, EIGHT, p, x)
    rules = ActivationRules([("product", None), *EIGHT.rules])
    assert measure_ranges(f, rules, p, [(x,)]).keys() == {"q", "k"}


def test_empty_arrays_leave_ranges_alone(rng):
    """A scan over products of matrices makes some itself."""
    f = lambda p, x: jax.lax.associative_scan(jnp.matmul, x @ p["w"])
    p, x = {"w": jnp.eye(3)}, jnp.asarray(rng.normal(size=(5, 3, 3)), jnp.float32)
    start = initial_ranges(f, EIGHT, p, x)
    _, ranges = quantize_inputs(f, EIGHT)(p, x, ranges=start, measure=True)
    np.testing.assert_allclose(ranges["w"].limit, np.abs(x).max())


def equations(jaxpr):
    """All of them, those in the bodies of others too."""
    for equation in jaxpr.eqns:
        yield equation
        for sub in core.jaxprs_in_params(equation.params):
            yield from equations(getattr(sub, "jaxpr", sub))


@pytest.mark.parametrize(("signed", "most"), [(True, 22), (False, 28)])
def test_an_input_is_traced_once_a_shape_as_few_equations(signed, most):
    """Tracing takes time by the equation and by the call: what has no shape is traced once."""
    f, params, inputs = NETWORKS["plain_scan"]()
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=signed))])
    ranges = initial_ranges(f, rules, params, *inputs)
    jax.clear_caches()
    quantized = functools.partial(quantize_inputs(f, rules), measure=True)
    program = jax.make_jaxpr(lambda p, x, ranges: quantized(p, x, ranges=ranges))
    steps = [
        equation.params["jaxpr"]
        for equation in equations(program(params, *inputs, ranges).jaxpr)
        if equation.params.get("name") == "_measured_and_quantized"
    ]
    products = find_products(f, params, *inputs)
    assert len(steps) == sum(len(product.inputs) for product in products)
    by_shape = {step.in_avals[0].shape: step for step in steps}
    assert {id(step) for step in steps} == {id(step) for step in by_shape.values()}
    calls = set()
    for step in by_shape.values():
        within = list(equations(step.jaxpr))
        here = [e for e in within if e.primitive.name == "jit"]
        calls |= {id(e.params["jaxpr"]) for e in here}
        without_shape = {id(e) for call in here for e in call.params["jaxpr"].eqns}
        assert sum(id(e) not in without_shape for e in within) <= most
    assert len(calls) == 2  # the range after a measurement, and the scalars of what it makes
