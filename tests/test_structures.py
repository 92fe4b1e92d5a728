"""Parameters as networks of today hold them: embeddings, heads, stacked layers, tied weights, LoRA.

What is expected is computed layer by layer, or channel by channel, in NumPy.
"""

from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ab_jax as ab
from ab_jax.export.packed import read_packed, write_packed

FEATURES, HEADS, LAYERS, TOKENS = 6, 3, 4, 11


def int4(axis: int | tuple[int, ...] = -1) -> ab.Uniform:
    return ab.Uniform(bits=4, scale="absmax", axis=axis)


def quantized_values(w: np.ndarray, reduced: tuple[int, ...]) -> np.ndarray:
    """Multiples of a seventh of the largest magnitude over the reduced axes."""
    w = np.asarray(w)
    scale = np.abs(w).max(reduced, keepdims=True) / np.float32(7)
    return np.round(w / scale) * scale


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Embeddings


class TiedDecoder(nn.Module):
    """Tokens to logits through one matrix, used twice."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(TOKENS, FEATURES, name="embed")
        return embed.attend(nn.tanh(nn.Dense(FEATURES, name="hidden")(embed(tokens))))


def test_an_embedding_has_a_scale_for_each_token_and_is_tied_to_the_logits(rng, key):
    model, tokens = TiedDecoder(), jnp.asarray(rng.integers(0, TOKENS, (2, 5)))
    params = model.init(key, tokens)["params"]
    rules = ab.Rules([("embed/embedding", int4(axis=0)), (".*", None)])
    assert ab.quantize(params, rules)["embed"]["embedding"].scale.shape == (TOKENS, 1)

    table = quantized_values(params["embed"]["embedding"], (1,))
    dense = jax.tree.map(np.asarray, params["hidden"])
    expected = np.tanh(table[tokens] @ dense["kernel"] + dense["bias"]) @ table.T
    logits = model.apply({"params": ab.blend(params, rules, 1.0)}, tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

    # One gradient: the sum of both uses', times 1 - alpha.
    def loss(first: jax.Array, second: jax.Array) -> jax.Array:
        hidden = nn.Dense(FEATURES).apply({"params": params["hidden"]}, first[tokens])
        return (jnp.tanh(hidden) @ second.T).sum()

    halfway = ab.blend(params, rules, 0.5)["embed"]["embedding"]
    plain = sum(jax.grad(loss, (0, 1))(halfway, halfway))
    found = jax.grad(lambda p: model.apply({"params": ab.blend(p, rules, 0.5)}, tokens).sum())(
        params
    )
    np.testing.assert_allclose(found["embed"]["embedding"], plain / 2, rtol=1e-4, atol=1e-5)


# Attention


def attention_params(framework: str, key: jax.Array) -> dict:
    if framework == "linen":
        layer = nn.MultiHeadDotProductAttention(HEADS)
        return layer.init(key, jnp.ones((1, 2, FEATURES)))["params"]
    attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(attention, nnx.Param))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_attention_has_a_scale_for_each_output_of_each_head(framework, key):
    """A projection is a matrix that was reshaped, and is quantized as that matrix."""
    params = attention_params(framework, key)
    rules = ab.Rules(
        [
            ("(query|key|value)/kernel", int4(axis=(-2, -1))),  # [features, heads, per head]
            ("out/kernel", int4()),  # [heads, per head, features]
            (".*", None),
        ]
    )
    quantized = ab.quantize(params, rules)
    per_head = FEATURES // HEADS
    for name in ("query", "key", "value"):
        assert params[name]["kernel"].shape == (FEATURES, HEADS, per_head)
        assert quantized[name]["kernel"].scale.shape == (1, HEADS, per_head)
        matrix = params[name]["kernel"].reshape(FEATURES, FEATURES)
        expected = quantized_values(matrix, (0,)).reshape(FEATURES, HEADS, per_head)
        np.testing.assert_allclose(quantized[name]["kernel"].dequantize(), expected, rtol=1e-6)
    assert params["out"]["kernel"].shape == (HEADS, per_head, FEATURES)
    assert quantized["out"]["kernel"].scale.shape == (1, 1, FEATURES)
    expected = quantized_values(params["out"]["kernel"], (0, 1))
    np.testing.assert_allclose(quantized["out"]["kernel"].dequantize(), expected, rtol=1e-6)

    axes = {
        row.path: row.quantizer.axis for row in ab.describe(params, rules).rows if row.quantizer
    }
    assert axes["query/kernel"] == (-2, -1)
    assert axes["out/kernel"] == -1
    (line,) = (s for s in str(ab.describe(params, rules)).splitlines() if s.startswith("query/ker"))
    assert "(-2, -1)" in line


# Layers that are stacked, with a leading axis


class ScannedLinen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(FEATURES, name="dense")(x)), None

        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return stack(name="layers")(x, None)[0]


def scanned_nnx(key):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(params=key))

    graph, params = nnx.split(make(jax.random.split(key, LAYERS)), nnx.Param)

    def apply(params, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, nnx.merge(graph, params))

    return params, apply


def scanned_equinox(key):
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(FEATURES, FEATURES, key=key))
    layers = make(jax.random.split(key, LAYERS))

    def apply(layers, x):
        arrays, static = eqx.partition(layers, eqx.is_array)

        def step(x, arrays):
            return jnp.tanh(jax.vmap(eqx.combine(arrays, static))(x)), None

        return jax.lax.scan(step, x, arrays)[0]

    return layers, apply


def scanned_linen(key):
    model = ScannedLinen()
    params = model.init(key, jnp.ones((1, FEATURES)))["params"]
    return params, lambda params, x: model.apply({"params": params}, x)


@pytest.mark.parametrize(
    ("make", "pattern", "output"),
    [
        (scanned_linen, "layers/dense/kernel", 2),
        (scanned_nnx, "kernel", 2),
        (scanned_equinox, "weight", 1),  # outputs first
    ],
)
def test_scanned_layers_are_quantized_one_by_one(make, pattern, output, rng, key):
    """With the layers' axis among the quantizer's, each layer has scales of its own."""
    params, apply = make(key)
    x = normal(rng, 3, FEATURES)
    rules = ab.Rules([(pattern, int4(axis=(0, output))), (".*", None)])
    (path,) = ab.quantized_paths(params, rules)
    leaves = {
        row.path: leaf
        for row, leaf in zip(ab.describe(params, rules).rows, jax.tree.leaves(params), strict=True)
    }
    stacked = np.asarray(leaves[path])
    bias = next(np.asarray(leaf) for name, leaf in leaves.items() if name.endswith("bias"))
    assert stacked.shape == (LAYERS, FEATURES, FEATURES)
    expected = np.asarray(x)
    for layer in range(LAYERS):
        w = quantized_values(stacked[layer], (2 - output,))
        expected = np.tanh(expected @ (w.T if output == 1 else w) + bias[layer])
    blended = apply(ab.blend(params, rules, 1.0), x)
    np.testing.assert_allclose(blended, expected, rtol=1e-4, atol=1e-5)
    # Without it, one scale serves a channel of all layers, which describe shows.
    shared = ab.Rules([(pattern, int4(axis=output)), (".*", None)])
    rows = (ab.describe(params, r).rows for r in (rules, shared))
    own, one = ({row.path: row.bytes_after for row in described}[path] for described in rows)
    assert own - one == (LAYERS - 1) * FEATURES * 4


def test_vmapped_layers_are_quantized_one_by_one(rng, key):
    experts = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0
    )(FEATURES)
    x = normal(rng, LAYERS, 2, FEATURES)
    params = experts.init(key, x)["params"]
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    rules = ab.Rules([("kernel", int4(axis=(0, -1))), ("bias", None)])
    found = experts.apply({"params": ab.blend(params, rules, 1.0)}, x)
    for i in range(LAYERS):
        expected = np.asarray(x[i]) @ quantized_values(kernel[i], (0,)) + bias[i]
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)


def test_learned_scales_of_stacked_layers(rng):
    """LSQ's second tree has the layers' axis too, and starts as each layer alone would."""
    params = {"kernel": normal(rng, LAYERS, FEATURES, FEATURES)}
    rules = ab.Rules([("kernel", int4(axis=(0, -1)))])
    scales = ab.initial_scales(params, rules)["kernel"]
    assert scales.shape == (LAYERS, 1, FEATURES)
    mean = np.abs(np.asarray(params["kernel"], np.float64)).mean(1, keepdims=True)
    np.testing.assert_allclose(scales, 2 * mean / np.sqrt(7), rtol=1e-5)


# Weights in two places


class TiedNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


def test_tied_weights_of_nnx_are_one_leaf(rng, key):
    model = TiedNNX(nnx.Rngs(params=key))
    graph, params = nnx.split(model, nnx.Param)
    rules = ab.Rules([(".*kernel", int4())])
    (path,) = ab.quantized_paths(params, rules)
    assert path == "first/kernel"
    blended = nnx.merge(graph, ab.blend(params, rules, 1.0))
    assert blended.first.kernel is blended.second.kernel
    x, w = normal(rng, 2, FEATURES), quantized_values(model.first.kernel[...], (0,))
    np.testing.assert_allclose(blended(x), np.tanh(x @ w) @ w, rtol=1e-4, atol=1e-5)


class TiedEquinox(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key: jax.Array):
        embed = eqx.nn.Embedding(TOKENS, FEATURES, key=key)
        head = eqx.nn.Linear(FEATURES, TOKENS, use_bias=False, key=key)
        self.shared = eqx.nn.Shared((embed, head), lambda m: m[1].weight, lambda m: m[0].weight)

    def __call__(self, token: jax.Array) -> jax.Array:
        embed, head = self.shared()
        return head(jnp.tanh(embed(token)))


def test_tied_weights_of_equinox_are_one_leaf(key):
    model = TiedEquinox(key)
    # Equinox leaves a mark in the second place, which is no array.
    rules = ab.Rules([("shared/pytree/0/weight", int4(axis=0)), (".*", None)])
    assert len(ab.quantized_paths(model, rules)) == 1
    embed, _ = model.shared()
    table = quantized_values(embed.weight, (1,))
    found = ab.blend(model, rules, 1.0)(jnp.asarray(3))
    np.testing.assert_allclose(found, table @ np.tanh(table[3]), rtol=1e-4, atol=1e-5)


# Weights that are frozen beside others that are trained


def test_lora_is_trained_on_top_of_codes(rng, key):
    layer = nnx.LoRALinear(FEATURES, 5, lora_rank=2, rngs=nnx.Rngs(params=key))
    layer.lora.lora_b[...] = normal(rng, 2, 5)
    graph, adapters, frozen = nnx.split(layer, nnx.LoRAParam, nnx.Param)
    rules = ab.Rules([("kernel", int4()), ("bias", None)])
    x = normal(rng, 3, FEATURES)

    @jax.jit
    def loss(adapters, frozen, alpha):
        return (nnx.merge(graph, adapters, ab.blend(frozen, rules, alpha))(x) ** 2).sum()

    w = quantized_values(layer.kernel[...], (0,))
    a, b = np.asarray(layer.lora.lora_a[...]), np.asarray(layer.lora.lora_b[...])
    inputs = np.asarray(x)
    y = inputs @ (w + a @ b) + np.asarray(layer.bias[...])
    gradient = jax.grad(loss)(adapters, frozen, 1.0)
    found = nnx.to_pure_dict(gradient)["lora"]
    np.testing.assert_allclose(found["lora_a"], inputs.T @ (2 * y) @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["lora_b"], (inputs @ a).T @ (2 * y), rtol=1e-4, atol=1e-4)
    # All in one tree, the adapters' rule comes first.
    whole = nnx.state(layer, nnx.Param)
    rules = ab.Rules([(".*lora_[ab]", None), ("kernel", int4()), ("bias", None)])
    assert ab.quantized_paths(whole, rules) == ["kernel"]


# Files


def test_packed_files_keep_scales_of_several_axes(tmp_path: Path, key):
    params = {
        "attention": attention_params("linen", key),
        "layers": {"kernel": jax.random.normal(key, (LAYERS, FEATURES, FEATURES))},
    }
    rules = ab.Rules(
        [
            ("attention/(query|key|value)/kernel", int4(axis=(-2, -1))),
            ("layers/kernel", ab.Ternary(axis=(0, -1))),
            (".*", None),
        ]
    )
    quantized = ab.quantize(params, rules)
    write_packed(tmp_path / "net.safetensors", {"params": quantized}, rules=rules)
    again = read_packed(tmp_path / "net.safetensors").variables["params"]
    assert jax.tree.structure(again) == jax.tree.structure(quantized)
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(quantized), strict=True):
        np.testing.assert_array_equal(found, wanted, strict=True)
