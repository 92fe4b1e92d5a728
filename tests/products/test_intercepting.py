"""A function evaluated with a handler in front of its products is the function, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.products import find_products, intercept, mark
from tests.products.networks_of_frameworks import NETWORKS, drawn


def unchanged(product, side, x, state):
    return x, state


def total(tree):
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(x)) for x in floats)


def assert_same(found, wanted):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_change_values_and_gradients_are_the_functions_own(name):
    f, params, inputs = NETWORKS[name]()
    same = intercept(f, unchanged)

    def both(function):
        def loss(params):
            outputs = function(params, *inputs)
            return total(outputs), outputs

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert_same(both(lambda p, *xs: same({}, p, *xs)[0]), both(f))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_handler_meets_each_input_of_each_product(name):
    """Zeros in place of every input leave nothing of the data but shapes."""
    f, params, inputs = NETWORKS[name]()
    met = []

    def zeros(product, side, x, state):
        met.append(product.inputs[side])
        return jnp.zeros_like(x), state

    intercept(f, zeros)({}, params, *inputs)
    wanted = [a for product in find_products(f, params, *inputs) for a in product.inputs.values()]
    assert set(met) == set(wanted)


def test_what_a_handler_gives_is_what_the_product_sees(rng):
    w, x = rng.normal(size=(4, 3)), rng.normal(size=(2, 4))
    doubled = intercept(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"],
        lambda product, side, x, state: (x * (2 if product.weight == "w" else 3), state),
    )
    v = rng.normal(size=(3, 2))
    found, _ = doubled({}, {"w": jnp.asarray(w), "v": jnp.asarray(v)}, jnp.asarray(x))
    np.testing.assert_allclose(found, 3 * np.tanh(2 * x @ w) @ v, rtol=1e-5, atol=1e-4)


def test_both_sides_of_a_square_may_differ(rng):
    """`x @ x` reads one value twice."""
    x = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    f = intercept(lambda p, x: x @ x, lambda product, side, x, state: (x * (side + 1), state))
    np.testing.assert_allclose(f({}, {}, x)[0], 2 * x @ x, rtol=1e-5)


def counting(product, side, x, state):
    return x, 1 + (0 if state is None else state)


def test_state_is_stacked_over_layers_and_carried_through_time():
    f, params, inputs = NETWORKS["plain_scan"]()
    paths = [a for product in find_products(f, params, *inputs) for a in product.inputs.values()]
    start = {path: jnp.zeros(3 if path.startswith("layers") else (), int) for path in paths}
    _, state = jax.jit(intercept(f, counting))(start, params, *inputs)
    for path, count in state.items():
        np.testing.assert_array_equal(count, np.ones(3) if path.startswith("layers") else 1)

    f, params, inputs = NETWORKS["linen_lstm"]()
    start = {product.address: jnp.zeros((), int) for product in find_products(f, params, *inputs)}
    _, state = intercept(f, counting)(start, params, *inputs)
    assert set(map(int, state.values())) == {6}  # steps of the sequence


def test_a_loop_of_unknown_length_and_branches_carry_it_too(rng):
    def f(p, x, n):
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ p["u"], lambda x: x @ p["v"], x)
        step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"]))
        return jax.lax.while_loop(lambda s: s[0] < n, step, (0, x))[1]

    p = {name: jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for name in "uvw"}
    x = jnp.ones((2, 3))
    counts = intercept(f, counting)
    start = {name: jnp.zeros((), int) for name in "uvw"}
    found, state = jax.jit(counts)(start, p, x, 5)
    np.testing.assert_array_equal(found, jax.jit(f)(p, x, 5))
    assert {name: int(n) for name, n in state.items()} == {"u": 1, "v": 0, "w": 5}
    assert {name: int(n) for name, n in counts(start, p, -x, 2)[1].items()} == {
        "u": 0,
        "v": 1,
        "w": 2,
    }


def in_a_scan(p, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, length=3)[0]


def in_a_branch(p, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: x, x)


def in_a_while(p, x):
    return jax.lax.while_loop(lambda x: x[0, 0] > 9, lambda x: x @ p["w"], x)


def over_layers_in_a_branch(p, x):
    layers = lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"][None])[0]
    return jax.lax.cond(x[0, 0] > 0, layers, lambda x: x, x)


@pytest.mark.parametrize("f", [in_a_scan, in_a_branch, in_a_while, over_layers_in_a_branch])
def test_loops_and_branches_make_no_entries_and_keep_their_shapes(rng, f):
    p, x = {"w": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)}, jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"entry of the state at w, where there was none.*w \(dot_general"
    ):
        intercept(f, counting)({}, p, x)
    wider = lambda product, side, x, state: (x, jax.tree.map(lambda s: s[..., None], state))
    start = jnp.zeros((1, 2) if f is over_layers_in_a_branch else (2,))
    with pytest.raises(ValueError, match=r"\[2,1\]\).*entry of the state at w.*\[2\]\).*keep"):
        intercept(f, wider)({"w": (start,)}, p, x)
    # None keeps the old entry, and whoever has none needs none.
    quiet = intercept(f, lambda product, side, x, state: (x, None))
    assert quiet({}, p, x)[1] == {}
    np.testing.assert_array_equal(quiet({"w": start}, p, x)[1]["w"], start)


def test_in_a_scan_over_layers_entries_may_appear_and_have_an_axis_for_them(rng):
    f, params, inputs = NETWORKS["plain_scan"]()
    _, state = intercept(f, counting)({}, params, *inputs)
    np.testing.assert_array_equal(state["layers/in"], np.ones(3))
    with pytest.raises(ValueError, match=r"state at layers/in .* shape \[2\].*of length 3"):
        intercept(f, counting)({"layers/in": jnp.zeros(2, int)}, params, *inputs)


def test_it_maps_over_an_ensemble(rng):
    f, params, inputs = NETWORKS["haiku_convolutions"]()
    halved = intercept(f, lambda product, side, x, state: (x / 2, state))
    both = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    found = jax.vmap(lambda p: halved({}, p, *inputs)[0])(both)
    for i in range(2):
        one, _ = halved({}, jax.tree.map(lambda w, i=i: w[i], both), *inputs)
        np.testing.assert_allclose(found[i], one, rtol=1e-5, atol=1e-6)


@jax.custom_vjp
def product_of_ones_own(x, w):
    return x @ w


product_of_ones_own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def test_a_product_in_a_custom_derivative_is_refused_unless_left_out_or_marked(rng):
    p = {"w": drawn(0, 4, 4), "v": drawn(1, 4, 2)}
    x = drawn(2, 3, 4)
    f = lambda p, x: product_of_ones_own(x, p["w"]) @ p["v"]
    with pytest.raises(
        ValueError, match=r"operands of w .*custom_vjp.*\('w', None\).*mark\(x, \"w\""
    ):
        intercept(f, unchanged)({}, p, x)
    without = intercept(f, unchanged, chosen=lambda found: [q for q in found if not q.opaque])
    assert_same(without({}, p, x)[0], f(p, x))

    def marked(p, x):
        return product_of_ones_own(mark(x, "w"), p["w"]) @ p["v"]

    doubled = intercept(marked, lambda q, side, x, s: (x * (2 if q.address == "w" else 1), s))
    np.testing.assert_allclose(doubled({}, p, x)[0], 2 * f(p, x), rtol=1e-5)


def test_a_handler_that_changes_the_shape_is_refused():
    f = intercept(lambda p, x: x @ p["w"], lambda product, side, x, state: (x[:1], state))
    with pytest.raises(ValueError, match=r"makes float32\[1, 3\] of the operand of w .*\[2, 3\]"):
        f({}, {"w": jnp.ones((3, 2))}, jnp.ones((2, 3)))


def test_shard_map_keeps_its_specs_and_gives_back_state_that_is_the_same_everywhere(rng, devices):
    mesh = jax.make_mesh(
        (4,), ("d",), devices=devices[:4], axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec

    def f(p, x):
        def local(w, x):
            return jax.lax.psum(x @ w, "d")

        return jax.shard_map(
            local, mesh=mesh, in_specs=(spec("d"), spec(None, "d")), out_specs=spec()
        )(p["w"], x)

    def largest(product, side, x, state):
        return x, jnp.maximum(state, jax.lax.pmax(jnp.max(x), product.mesh_axes))

    p = {"w": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    found, state = jax.jit(intercept(f, largest))({"w": jnp.zeros(())}, p, x)
    np.testing.assert_array_equal(found, jax.jit(f)(p, x))
    assert state["w"] == np.max(np.asarray(x))
