"""Small networks of every framework: each makes a function, its parameters and its inputs."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

Case = tuple[Callable[..., Any], Any, tuple[Any, ...]]


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


class Pictures(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="grouped")(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def linen_convolutions() -> Case:
    model, x = Pictures(), drawn(1, 2, 8, 8, 3)
    variables = model.init(jax.random.key(0), x)
    rest = {"batch_stats": variables["batch_stats"]}
    return lambda p, x: model.apply({"params": p, **rest}, x), variables["params"], (x,)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(2, name="attention")(y, y)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(2, name="head")(layers(name="layers")(x, None)[0].mean(1))


def linen_scan_of_layers() -> Case:
    model, x = Scanned(), drawn(1, 2, 5, 8)
    params = model.init(jax.random.key(0), x)["params"]
    return lambda p, x: model.apply({"params": p}, x), params, (x,)


def linen_lstm() -> Case:
    model, x = nn.RNN(nn.LSTMCell(4)), drawn(1, 2, 6, 3)
    params = model.init(jax.random.key(0), x)["params"]
    return lambda p, x: model.apply({"params": p}, x), params, (x,)


def called(model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda p, *xs: nnx.merge(graph, p, rest, copy=True)(*xs), params


class Mixed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, 8, (2, 2), strides=2, rngs=rngs)
        self.qkv = nnx.Einsum("btd,dknh->kbtnh", (8, 3, 2, 4), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x).reshape(x.shape[0], -1, 8)
        x += nnx.dot_product_attention(*self.qkv(x)).reshape(x.shape)
        return self.head((x + self.attention(x)).mean(1))


def nnx_einsum_and_attention() -> Case:
    return *called(Mixed(nnx.Rngs(0))), (drawn(1, 2, 4, 4, 1),)


class Stacked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def made(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 6, rngs=rngs)

        self.layers = made(rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: nnx.Linear, x: jax.Array) -> jax.Array:
            return x + nnx.gelu(layer(x))

        return self.head(run(self.layers, x))


def nnx_scan_of_layers() -> Case:
    return *called(Stacked(nnx.Rngs(0))), (drawn(1, 4, 6),)


class Decoder(nnx.Module):
    """Grouped queries, a cache, a gated MLP, and an embedding that gives the logits too."""

    def __init__(self, rngs: nnx.Rngs):
        def linear(features: int, out: int) -> nnx.Linear:
            return nnx.Linear(features, out, use_bias=False, rngs=rngs)

        self.embedding = nnx.Embed(16, 8, rngs=rngs)
        self.query, self.key, self.value = linear(8, 8), linear(8, 4), linear(8, 4)
        self.out, self.gate, self.up, self.down = (
            linear(*sizes) for sizes in ((8, 8), (8, 12), (8, 12), (12, 8))
        )
        self.norm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, tokens: jax.Array, cache: jax.Array, at: jax.Array) -> Any:
        x = self.embedding(tokens)
        batch, length, _ = x.shape
        y = self.norm(x)
        keys = self.key(y).reshape(batch, length, 1, 4)
        values = self.value(y).reshape(batch, length, 1, 4)
        cache = jax.lax.dynamic_update_slice(cache, jnp.stack([keys, values]), (0, 0, at, 0, 0))
        queries = self.query(y).reshape(batch, length, 1, 2, 4)
        scores = jnp.einsum("btkgd,bskd->bkgts", queries, cache[0])
        seen = jnp.arange(cache.shape[2])[None] <= at + jnp.arange(length)[:, None]
        scores = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -1e30))
        mixed = jnp.einsum("bkgts,bskd->btkgd", scores, cache[1]).reshape(x.shape)
        x += self.out(mixed)
        x += self.down(nnx.silu(self.gate(x)) * self.up(x))
        return self.embedding.attend(self.norm(x)), cache


def nnx_decoder() -> Case:
    inputs = (jnp.arange(6).reshape(2, 3), drawn(2, 2, 2, 7, 1, 4), jnp.int32(2))
    return *called(Decoder(nnx.Rngs(0))), inputs


class Tokens(eqx.Module):
    patches: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.patches = eqx.nn.Conv2d(2, 8, 2, 2, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
        self.mlp = eqx.nn.MLP(8, 3, 8, 1, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x).reshape(8, -1).T
        return self.mlp((x + self.attention(x, x, x)).mean(0))


def equinox_attention() -> Case:
    params, static = eqx.partition(Tokens(jax.random.key(0)), eqx.is_inexact_array)
    return (
        lambda p, x: jax.vmap(eqx.combine(p, static))(x),
        params,
        (drawn(1, 3, 2, 4, 4),),
    )


def haiku_convolutions() -> Case:
    def network(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(hk.Conv2D(4, 3, name="stem")(x))
        return hk.nets.MLP([6, 3], name="head")(x.mean((1, 2)))

    model, x = hk.without_apply_rng(hk.transform(network)), drawn(1, 2, 6, 6, 3)
    return model.apply, model.init(jax.random.key(0), x), (x,)


def plain_scan() -> Case:
    params = {
        "layers": {"in": drawn(0, 3, 6, 2, 3) * 0.3, "out": drawn(2, 3, 2, 3, 6) * 0.3},
        "head": drawn(3, 6, 2),
    }

    def forward(params: Any, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            q = jnp.einsum("btd,dnh->btnh", x, own["in"])
            seen = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, q))
            mixed = jnp.einsum("bnts,bsnh->btnh", seen, q)
            return x + jnp.einsum("btnh,nhd->btd", mixed, own["out"]), None

        return jax.lax.scan(layer, x, params["layers"])[0].mean(1) @ params["head"]

    return forward, params, (drawn(1, 2, 5, 6),)


NETWORKS: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        *(linen_convolutions, linen_scan_of_layers, linen_lstm),
        *(nnx_einsum_and_attention, nnx_scan_of_layers, nnx_decoder),
        *(equinox_attention, haiku_convolutions, plain_scan),
    )
}
