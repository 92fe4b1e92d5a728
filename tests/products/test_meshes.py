"""Quantized inputs of weights and data that lie on several devices, on every kind of mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.products import (
    ActivationRules,
    Range,
    find_products,
    initial_ranges,
    measure_ranges,
    quantize_inputs,
)

RULES = ab.Rules([(".*", ab.Uniform(bits=4, scale="absmax"))])
QUANTIZERS = [
    ActivationQuantizer(bits=8),
    ActivationQuantizer(bits=8, percentile=90.0),
    ActivationQuantizer(bits=8, signed=False),
    TokenQuantizer(bits=8),
]
# How the first weight, the second one and the data lie.
LAYOUTS = {
    "data": (P(None, None), P(None, None), P("x", None)),
    "inputs": (P("x", None), P(None, "x"), P(None, "x")),
    "outputs": (P(None, "x"), P("x", None), P(None, None)),
}


def forward(p, x):
    """Shardings that may be explicit want to be told those of results that sum over devices."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    told = {"out_sharding": P()} if explicit else {}
    hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, p["first"], **told))
    return jnp.einsum("bi,io->bo", hidden, p["second"], **told)


def loss(p, ranges, x, rules):
    effective = ab.blend(p, RULES, 0.5)
    y, ranges = quantize_inputs(forward, rules)(effective, x, ranges=ranges, measure=True)
    return jnp.sum(jnp.sin(y)), (y, ranges)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_shared_weights_and_data_compute_what_whole_ones_do(rng, devices, quantizer, layout, kind):
    p = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"first": (8, 16), "second": (16, 4)}.items()
    }
    x = rng.normal(size=(8, 8)).astype(np.float32)
    rules = ActivationRules([(".*", quantizer)])
    gradient = jax.value_and_grad(loss, has_aux=True)
    start = initial_ranges(forward, rules, p, x)
    (_, (wanted, ranges)), of_whole = gradient(p, start, x, rules)

    mesh = jax.make_mesh((4,), ("x",), devices=devices[:4], axis_types=(kind,))
    with jax.set_mesh(mesh):
        *of_weights, of_data = LAYOUTS[layout]
        on = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip((*p.values(), x), (*of_weights, of_data), strict=True)
        ]
        shared = dict(zip(p, on, strict=False))
        begun = initial_ranges(forward, rules, shared, on[-1])
        step = jax.jit(gradient, static_argnums=3)
        (_, (found, of_shared)), gradients = step(shared, begun, on[-1], rules)
    # Half-way between two levels the last bit decides: one code of a row may differ.
    off = np.abs(np.asarray(found) - wanted)
    assert np.median(off) < 1e-5
    assert np.max(off) < 0.1
    for one, other in zip(jax.tree.leaves(of_shared), jax.tree.leaves(ranges), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    for name, spec in zip(p, of_weights, strict=True):
        off = np.abs(np.asarray(gradients[name]) - of_whole[name]) / np.abs(of_whole[name]).max()
        assert np.median(off) < 5e-3  # all of a gradient, for such a code
        if kind == AxisType.Explicit:
            assert gradients[name].sharding.spec == spec


def chosen_by_sign(p, x):
    """A product for the rows, one a device, whose first number is positive."""
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: 2 * x, x)


def again_and_again(p, x):
    """As often as the first number of the row says."""
    more = lambda s: s[0] < x[0, 0]
    return jax.lax.while_loop(more, lambda s: (s[0] + 1, s[1] @ p["w"]), (0.0 * x[0, 0], x))[1]


def layers_by_sign(p, x):
    """Branches in branches, and a scan in them."""
    layers = lambda x: jax.lax.scan(lambda x, _: (x @ p["w"], None), x, None, length=2)[0]
    inner = lambda x: jax.lax.cond(x[0, 1] > 0, layers, lambda x: x, x)
    return jax.lax.cond(x[0, 0] > 0, inner, lambda x: x, x)


def rows_that_meet(body, w, x):
    """By NumPy: for each device the inputs of its products."""
    if body is chosen_by_sign:
        return [[row] if row[0] > 0 else [] for row in x]
    if body is again_and_again:
        counts = [max(0, int(np.ceil(row[0]))) for row in x]
    else:
        counts = [2 if row[0] > 0 and row[1] > 0 else 0 for row in x]
    powers = [np.linalg.matrix_power(w, k) for k in range(max(counts) + 1)]
    return [[row @ powers[k] for k in range(n)] for row, n in zip(x, counts, strict=True)]


def over_devices(body, mesh, spec, check_vma=True):
    return jax.shard_map(body, mesh=mesh, in_specs=(P(), spec), out_specs=spec, check_vma=check_vma)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("percentile", [None, 75.0])
@pytest.mark.parametrize("body", [chosen_by_sign, again_and_again, layers_by_sign])
def test_devices_that_branch_each_for_itself_meet_in_one_range(
    rng, devices, body, percentile, check_vma
):
    x = rng.normal(size=(4, 6)).astype(np.float32)
    x[:, 0] = rng.permutation([0.5, -1.0, 2.5, 1.5])
    x[:, 1] = np.abs(x[:, 1]) * rng.permutation([1, 1, 1, -1])
    w = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    quantizer = ActivationQuantizer(bits=8, percentile=percentile)
    rules = ActivationRules([(".*", quantizer)])
    mesh = jax.make_mesh((4,), ("d",), devices=devices[:4], axis_types=(AxisType.Auto,))
    f = over_devices(body, mesh, P("d"), check_vma)
    quantized = jax.jit(quantize_inputs(f, rules), static_argnames="measure")
    y, ranges = quantized({"w": w}, x, ranges=initial_ranges(f, rules, {"w": w}, x), measure=True)
    # Until the devices meet there is no range, and the input is left as it is.
    np.testing.assert_allclose(y, f({"w": w}, x), rtol=1e-4, atol=1e-5)
    seen = [inputs for inputs in rows_that_meet(body, w, x) if inputs]
    if percentile is None:
        wanted = max(np.abs(row).max() for inputs in seen for row in inputs)
    else:
        wanted = np.mean(
            [max(np.percentile(np.abs(row), percentile) for row in inputs) for inputs in seen]
        )
    np.testing.assert_allclose(ranges["w"].limit, wanted, rtol=0.01)

    if body is chosen_by_sign:
        y, after = quantized({"w": w}, 2 * x, ranges=ranges, measure=True)
        codes = np.clip(np.round(2 * x * (127 / wanted)), -127, 127)
        met = np.where(x[:, :1] > 0, (codes * wanted / 127) @ w, 4 * x)
        np.testing.assert_allclose(y, met, rtol=0.05, atol=0.05)
        np.testing.assert_allclose(after["w"].limit, 1.01 * ranges["w"].limit, rtol=1e-5)


def test_of_two_axes_devices_part_along_those_that_decide(rng, devices):
    """Along the other one they come by together, as their range does."""
    x = np.abs(rng.normal(size=(2, 6))).astype(np.float32)
    x[0, 0], x[1, 2] = -1, 7
    w = rng.normal(size=(6, 6)).astype(np.float32)
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "e"), devices=devices[:4], axis_types=kinds)
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8))])
    for spec in (P("d"), P("e")):
        f = over_devices(chosen_by_sign, mesh, spec)
        (product,) = find_products(f, {"w": w}, x)
        assert product.apart - {""} == {*spec}
        ranges = measure_ranges(f, rules, {"w": w}, [(x,)])
        np.testing.assert_allclose(ranges["w"].limit, 7)


@pytest.mark.parametrize("check_vma", [True, False])
def test_who_parts_once_more_meets_step_by_step(rng, devices, check_vma):
    """First along one axis, by what devices along the other one sum up; then along both."""
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "e"), devices=devices[:4], axis_types=kinds)
    x = np.abs(rng.normal(size=(2, 2, 6))).astype(np.float32)
    x[..., 0] = [[3, 1], [0, 1]]
    x[..., 1] = rng.permutation([[0, 1], [1, 0]])

    def body(p, x):
        inner = lambda x: jax.lax.cond(x[0, 0, 1] > 0.5, lambda x: x @ p["w"], lambda x: x, x)
        return jax.lax.cond(jax.lax.psum(x[0, 0, 0], "e") > 2, inner, lambda x: x, x)

    f = over_devices(body, mesh, P("d", "e"), check_vma)
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8))])
    p = {"w": rng.normal(size=(6, 6)).astype(np.float32)}
    ranges = measure_ranges(f, rules, p, [(x,)])
    (row,) = [row for row in x[0] if row[1] > 0.5]
    np.testing.assert_allclose(ranges["w"].limit, row.max())


@pytest.mark.parametrize("around", ["pmap", "vmap", "shard_map"])
def test_where_the_function_itself_is_mapped_they_meet_too(rng, devices, around):
    x = rng.normal(size=(4, 1, 6)).astype(np.float32)
    x[:, 0, 0] = rng.permutation([1, -1, 2, -2])
    p = {"w": rng.normal(size=(6, 6)).astype(np.float32)}
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=False))])

    def measured(x):
        quantized = quantize_inputs(chosen_by_sign, rules, axis_name="d")
        return quantized(p, x, ranges={"w": Range.of(0.0)}, measure=True)[1]["w"]

    if around == "shard_map":
        mesh = jax.make_mesh((4,), ("d",), devices=devices[:4], axis_types=(AxisType.Auto,))
        found = jax.shard_map(measured, mesh=mesh, in_specs=P("d"), out_specs=P())(x[:, 0])
    else:
        options = {"devices": devices[:4]} if around == "pmap" else {}
        found = getattr(jax, around)(measured, axis_name="d", **options)(x)
    rows = [row for row in x[:, 0] if row[0] > 0]
    cut = max(np.maximum(-row, 0).sum() / np.abs(row).sum() for row in rows)
    np.testing.assert_allclose(found.limit, np.full(found.limit.shape, np.abs(rows).max()))
    np.testing.assert_allclose(found.cut, np.full(found.cut.shape, cut), rtol=1e-5)


def test_what_is_not_finite_on_a_device_alone_is_counted(rng, devices):
    x = np.abs(rng.normal(size=(4, 6))).astype(np.float32)
    x[2, 3] = np.nan
    p = {"w": rng.normal(size=(6, 6)).astype(np.float32)}
    mesh = jax.make_mesh((4,), ("d",), devices=devices[:4], axis_types=(AxisType.Auto,))
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8))])
    f = over_devices(chosen_by_sign, mesh, P("d"))
    start = initial_ranges(f, rules, p, x)
    _, ranges = jax.jit(quantize_inputs(f, rules), static_argnames="measure")(
        p, x, ranges=start, measure=True
    )
    assert ranges["w"].not_finite == 1
    np.testing.assert_allclose(ranges["w"].limit, np.nanmax(x[[0, 1, 3]]))


def test_layers_of_which_each_device_has_its_own_share_a_range(rng, devices):
    """As library.md says, and experts that are one product; those of a scan do not."""
    x = rng.normal(size=(4, 1, 6)).astype(np.float32)
    x *= np.float32([1, 9, 3, 2])[:, None, None]
    p = {"w": rng.normal(size=(4, 6, 6)).astype(np.float32)}
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8))])
    mesh = jax.make_mesh((4,), ("d",), devices=devices[:4], axis_types=(AxisType.Auto,))
    own = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))
    over_layers = lambda p, x: jax.lax.map(lambda both: both[0] @ both[1], (x, p["w"]))
    for f, wanted in (
        (lambda p, x: own(x, p["w"]), np.abs(x).max()),
        (lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), np.abs(x).max()),
        (over_layers, np.abs(x).max((1, 2))),
    ):
        found = measure_ranges(f, rules, p, [(x,)])["w"]
        np.testing.assert_allclose(found.limit, wanted)
