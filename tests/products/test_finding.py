"""Which products a function has, and under which addresses; every trap that was met."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from ab_jax.activations import ActivationQuantizer
from ab_jax.products import ActivationRules, find_products, initial_ranges, mark
from tests.products.networks_of_frameworks import NETWORKS, drawn

X = drawn(9, 4, 8)


def listed(f, params, *inputs):
    """By address: kind and channel axes."""
    return {p.address: (p.kind, p.channel_axes) for p in find_products(f, params, *inputs)}


def test_products_are_addressed_by_the_paths_of_their_weights():
    found = {name: listed(*_flat(NETWORKS[name]())) for name in NETWORKS}
    assert found["linen_convolutions"] == {
        "stem/kernel": ("weight", (3,)),
        "grouped/kernel": ("weight", (3,)),
        "head/kernel": ("weight", (1,)),
    }
    # A stack of layers: the axis of layers is a channel axis too.
    assert found["linen_scan_of_layers"] == {
        "layers/attention/query/kernel": ("weight", (0, 2, 3)),
        "layers/attention/key/kernel": ("weight", (0, 2, 3)),
        "layers/attention/value/kernel": ("weight", (0, 2, 3)),
        "layers/attention/product": ("activation", None),
        "layers/attention/product#1": ("activation", None),
        "layers/attention/out/kernel": ("weight", (0, 3)),
        "layers/up/kernel": ("weight", (0, 2)),
        "layers/down/kernel": ("weight", (0, 2)),
        "head/kernel": ("weight", (1,)),
    }
    assert found["nnx_einsum_and_attention"]["qkv/kernel"] == ("weight", (1, 2, 3))
    assert found["nnx_einsum_and_attention"]["qkv/product#1"] == ("activation", None)
    # The table of an embedding that gives the logits: channels are its rows.
    assert found["nnx_decoder"]["embedding/embedding"] == ("weight", (0,))
    assert found["equinox_attention"]["attention/query_proj/weight"] == ("weight", (0,))
    assert found["haiku_convolutions"].keys() == {
        *("stem/w", "head/~/linear_0/w", "head/~/linear_1/w"),
    }
    assert found["plain_scan"]["layers/in"] == ("weight", (0, 2, 3))
    assert found["plain_scan"]["layers/out"] == ("weight", (0, 3))
    assert len(found["linen_lstm"]) == 8


def _flat(case):
    f, params, inputs = case
    return f, params, *inputs


def test_the_line_of_the_model_is_told_not_that_of_its_framework():
    f, params, inputs = NETWORKS["linen_convolutions"]()
    for product in find_products(f, params, *inputs):
        path, _, line = product.where.rpartition(":")
        assert path.endswith("networks_of_frameworks.py")
        name = product.address.split("/")[0]
        assert f'name="{name}"' in Path(path).read_text().splitlines()[int(line) - 1]


def attention(p, x):
    h = x.reshape(1, 4, 2, 4)
    q, k, v = (jnp.einsum("bthd,de->bthe", h, p[name]) for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v)


def three_layers(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


def looped(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def by_direction_and_length(p, x):
    return x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True) * p["g"][None])


TRAPS = {
    "weight norm: the one that is as large": (
        by_direction_and_length,
        {"v": (8, 4), "g": (4,)},
        {"v": ("weight", (1,))},
    ),
    "adapters": (
        lambda p, x: x @ p["w"] + x @ (p["a"] @ p["b"]),
        {"w": (8, 4), "a": (8, 2), "b": (2, 4)},
        {"w": ("weight", (1,)), "parameters": ("parameter", (0,)), "a": ("weight", None)},
    ),
    "a weight used twice": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
        {"w": (8, 4)},
        {"w": ("weight", (1,)), "w#1": ("weight", (0,))},
    ),
    "a stack indexed in Python": (
        three_layers,
        {"w": (3, 8, 8)},
        dict.fromkeys(("w", "w#1", "w#2"), ("weight", (0, 2))),
    ),
    "a stack indexed in a loop": (looped, {"w": (3, 8, 8)}, {"w": ("weight", (0, 2))}),
    "a split weight": (
        lambda p, x: jnp.einsum("bd,sdnh->sbnh", x, p["qkv"].reshape(8, 3, 2, 4).swapaxes(0, 1)),
        {"qkv": (8, 24)},
        {"qkv": ("weight", (1,))},
    ),
    "heads that are merged": (
        lambda p, x: x @ p["out"].reshape(8, 4),
        {"out": (2, 4, 4)},
        {"out": ("weight", (2,))},
    ),
    "attention without a module": (
        attention,
        dict.fromkeys("qkv", (4, 4)),
        {
            **dict.fromkeys("qkv", ("weight", (1,))),
            "product": ("activation", None),
            "product#1": ("activation", None),
        },
    ),
    "a constant matrix": (
        lambda p, x: (x @ jnp.ones((8, 8))) @ p["w"],
        {"w": (8, 4)},
        {"constant": ("constant", None), "w": ("weight", (1,))},
    ),
    "patches": (
        lambda p, x: (
            jax.lax.conv_general_dilated_patches(
                x.reshape(1, 2, 4, 4), (3, 3), (1, 1), "SAME"
            ).transpose(0, 2, 3, 1)
            @ p["w"]
        ),
        {"w": (18, 4)},
        {"constant": ("constant", None), "w": ("weight", (1,))},
    ),
    "weights that a network gives": (
        lambda p, x: jnp.einsum("bd,bdf->bf", x, (x @ p["h"]).reshape(4, 8, 2)),
        {"h": (8, 16)},
        {"h": ("weight", (1,)), "h/product": ("activation", None)},
    ),
    "experts picked by the data": (
        lambda p, x: jnp.einsum("bd,bdf->bf", x, p["experts"][jnp.argmax(x, 1) % 3]),
        {"experts": (3, 8, 2)},
        {"experts": ("weight", (0, 2))},
    ),
    "an embedding": (
        lambda p, x: p["table"][jnp.argmax(x, 1)] @ p["w"] @ p["table"].T,
        {"table": (8, 5), "w": (5, 5)},
        {"w": ("weight", (1,)), "table": ("weight", (0,))},
    ),
    "heads by vmap and rows by map": (
        lambda p, x: jax.lax.map(lambda row: jax.vmap(lambda w: row @ w)(p["heads"]), x),
        {"heads": (3, 8, 2)},
        {"heads": ("weight", (0, 2))},
    ),
    "integers": (lambda p, x: jnp.argsort(x) @ jnp.ones((8, 2), int), {"w": (2,)}, {}),
    "a product in a loop's test": (
        lambda p, x: jax.lax.while_loop(lambda x: jnp.sum(x @ p["w"]) > 9, lambda x: x / 2, x),
        {"w": (8, 8)},
        {"w": ("weight", (1,))},
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap):
    f, shapes, wanted = TRAPS[trap]
    params = {name: drawn(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    assert listed(f, params, X) == wanted


def test_ragged_products_of_experts_are_seen():
    params = {"experts": drawn(0, 3, 8, 2)}
    f = lambda p, x, sizes: jax.lax.ragged_dot(x, p["experts"], sizes)
    assert listed(f, params, X, jnp.array([1, 2, 1])) == {"experts": ("weight", (0, 2))}


def test_a_pallas_kernel_is_listed_as_what_cannot_be_changed():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    def f(p, x):
        shape = jax.ShapeDtypeStruct((4, 8), jnp.float32)
        return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(x, p["w"])

    (product,) = find_products(f, {"w": drawn(0, 8, 8)}, X)
    assert (product.address, product.opaque, product.inputs) == ("w", "pallas_call", {})


def test_what_is_marked_is_an_input_and_is_not_listed_twice():
    def depthwise(x, w):  # no product in its jaxpr
        return sum(x[:, i : i + 6] * w[i] for i in range(3))

    params = {"taps": drawn(0, 3), "w": drawn(1, 6, 2)}
    unseen = lambda p, x: depthwise(x, p["taps"]) @ p["w"]
    assert list(listed(unseen, params, X)) == ["w"]
    marked = lambda p, x: depthwise(mark(x, "taps"), p["taps"]) @ p["w"]
    assert listed(marked, params, X) == {"taps": ("marked", None), "w": ("weight", (1,))}
    np.testing.assert_array_equal(marked(params, X), unseen(params, X))
    # A product with an equation after all, as the same layer has on another backend.
    twice = lambda p, x: mark(x[:, :6], "w") @ p["w"]
    assert listed(twice, params, X) == {"w": ("marked", (1,))}
    (product,) = find_products(twice, params, X)
    assert product.shapes == ((4, 6),), "the input, as it was marked"
    assert product.followed_by.shapes == ((4, 6), (6, 2))


def test_nothing_is_computed_to_find_products():
    shapes = jax.eval_shape(lambda: {"w": jnp.zeros((10**5, 10**5))})
    (product,) = find_products(
        lambda p, x: x @ p["w"], shapes, jax.ShapeDtypeStruct((1, 10**5), "f4")
    )
    assert product.shapes == ((1, 10**5), (10**5, 10**5))


def test_bodies_of_every_kind_of_custom_call_are_listed():
    @jax.custom_batching.sequential_vmap
    def mapped(w, x):
        return x @ w

    (product,) = find_products(lambda p, x: mapped(p["w"], x), {"w": drawn(0, 8, 4)}, X[0])
    assert (product.address, product.opaque) == ("w", "custom_vmap_call")

    def solved(p, x):
        return jax.scipy.sparse.linalg.cg(lambda v: p["w"] @ v, x)[0]

    for product in find_products(solved, {"w": jnp.eye(3)}, jnp.ones(3)):
        assert product.opaque is None or product.inputs == {}


def by_a_library(x, w):
    return jax.ffi.ffi_call("a_product", jax.ShapeDtypeStruct((4, 8), x.dtype))(x, w)


def by_numpy(x, w):
    shape = jax.ShapeDtypeStruct((4, 8), x.dtype)
    return jax.pure_callback(np.matmul, shape, x, w, vmap_method="sequential")


# As jax.nn.dot_product_attention(implementation="cudnn") leaves it in a jaxpr, with a derivative of
# its own around it: without that library JAX does not trace the call itself.
CUDNN = core.Primitive("dot_product_attention_fwd_wrapper")
CUDNN.multiple_results = True
CUDNN.def_abstract_eval(lambda query, *_, **options: [query])
attended = jax.custom_vjp(lambda q, k, v: CUDNN.bind(q, k, v, jnp.zeros(0), scale=0.5)[0])
attended.defvjp(lambda *operands: (attended(*operands), ()), lambda _, g: (g, g, g))


def by_cudnn(p, x):
    q, k, v = (jnp.einsum("bd,de->be", x, p[name])[None, :, None] for name in "qkv")
    return attended(q, k, v)[0, :, 0]


@pytest.mark.parametrize("product_by", [by_a_library, by_numpy])
def test_programs_that_are_no_jaxprs_are_listed_as_what_cannot_be_changed(product_by):
    p = {"w": drawn(0, 8, 8)}
    (product,) = find_products(lambda p, x: product_by(x, p["w"]), p, X)
    assert (product.address, product.kind, product.inputs) == ("w", "weight", {})
    assert product.opaque in ("ffi_call", "pure_callback")
    # What is marked is not listed twice; a number makes no product, nor does what gives no result.
    assert listed(lambda p, x: product_by(mark(x, "w"), p["w"]), p, X) == {"w": ("marked", None)}
    assert listed(lambda p, x: product_by(x, jnp.float32(2)), p, X) == {}
    assert listed(lambda p, x: jax.debug.callback(print, x, p["w"]), p, X) == {}


def test_attention_of_cudnn_is_listed_as_what_cannot_be_changed():
    p = {name: drawn(i, 8, 8) for i, name in enumerate("qkv")}
    *weights, product = find_products(by_cudnn, p, X)
    assert [weight.address for weight in weights] == ["q", "k", "v"]
    assert (product.address, product.kind) == ("product", "activation")
    assert product.opaque.startswith("custom_vjp")
    eight = ActivationQuantizer(bits=8)
    with pytest.raises(ValueError, match=r"operands of product .*\('product', None\)"):
        initial_ranges(by_cudnn, ActivationRules([(".*", eight)]), p, X)
    rules = ActivationRules([("product", None), (".*", eight)])
    assert initial_ranges(by_cudnn, rules, p, X).keys() == set("qkv")


def test_only_floats_are_marked():
    with pytest.raises(TypeError, match="floats at w, not int32"):
        mark(jnp.arange(3), "w")
