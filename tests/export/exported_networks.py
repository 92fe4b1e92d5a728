"""Small networks of many kinds, with random weights that cost nothing to make."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.activations import sign
from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.efficientnet_lite import EfficientNetLite
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import ResNet
from ab_jax.quantized import Quantized
from tests.products import networks_of_frameworks as frameworks

#: A function, its parameters, and its inputs at a batch of 3.
Case = tuple[Callable[..., Any], Any, tuple[Any, ...]]


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def off_borders(x: np.ndarray, step: Any) -> np.ndarray:
    """Numbers a tenth nearer to multiples of `step`, so that how one divides tips none of them."""
    nearest = np.rint(x / step) * step
    return (nearest + 0.9 * (x - nearest)).astype(np.float32)


def filled(shapes: Any, rng: np.random.Generator) -> Any:
    """Random numbers for a tree of shapes: weights by what they sum over, variances above 0."""

    def leaf(path: Any, shape: Any) -> np.ndarray:
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith(("var", "scale")):
            return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
        summed = max(np.prod(shape.shape[:-1]), 1)
        return (rng.normal(size=shape.shape) / np.sqrt(summed)).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def linen(model: nn.Module, rng: np.random.Generator, *inputs: Any, **options: Any) -> Case:
    """A Linen model; its statistics are no parameters."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), *x, **options), inputs)
    variables = filled(shapes, rng)
    params = variables.pop("params")
    return lambda p, *xs: model.apply({"params": p, **variables}, *xs, **options), params, inputs


def coded(params: Any, bits: int, axis: int = -1, zero_point: bool = False) -> Any:
    """Parameters of two axes and more as codes by their largest magnitude a channel."""

    def leaf(w: Any) -> Any:
        w = np.asarray(w)
        if w.ndim < 2 or w.dtype != np.float32:
            return w
        axes = tuple(i for i in range(w.ndim) if i != axis % w.ndim)
        highest = 2 ** (bits - 1) - 1
        scale = (np.abs(w).max(axes, keepdims=True) / highest + 1e-6).astype(np.float32)
        codes = np.clip(np.rint(w / scale), -highest, highest).astype(np.int8)
        zero = (codes.max(axes, keepdims=True) // 3).astype(np.int8) if zero_point else None
        return Quantized(codes, scale, zero, bits, "float32")

    return jax.tree.map(leaf, params)


def dequantized(params: Any) -> Any:
    """What `coded` stands for, by NumPy."""

    def leaf(w: Any) -> Any:
        if not isinstance(w, Quantized):
            return w
        offsets = w.codes.astype(np.float32) - np.float32(
            0 if w.zero_point is None else w.zero_point
        )
        return offsets * w.scale

    return jax.tree.map(leaf, params, is_leaf=lambda w: isinstance(w, Quantized))


class Pictures(nn.Module):
    """GELU and LayerNorm between convolutions."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.gelu(nn.LayerNorm()(nn.Conv(4, (3, 3), strides=2)(x)))
        return nn.Dense(3)(nn.gelu(nn.Conv(6, (3, 3))(x), approximate=False).mean((1, 2)))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(4, (2, 2), strides=2)(x)
        for i in range(2):
            y = nn.LayerNorm(epsilon=1e-6)(nn.Conv(4, (7, 7), feature_group_count=4)(x))
            y = nn.Dense(4)(nn.gelu(nn.Dense(16)(y)))
            x += self.param(f"gamma{i}", nn.initializers.ones, (1, 1, 1, 4)) * y
        return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        branches = [nn.Conv(3, (size, size))(x) for size in (1, 3, 5)]
        pooled = nn.Conv(2, (1, 1))(nn.avg_pool(x, (3, 3), (1, 1), "SAME"))
        x = nn.relu(jnp.concatenate([*branches, pooled], -1))
        return nn.Dense(3)(nn.max_pool(x, (3, 3), (2, 2), "SAME").mean((1, 2)))


class MobileNetV3(nn.Module):
    """Hard swish, squeeze and excite, batch norm."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(8, (1, 1), use_bias=False)(x)
        x = nn.hard_swish(nn.BatchNorm(use_running_average=True)(x))
        x = nn.hard_swish(nn.Conv(8, (5, 5), strides=2, feature_group_count=8)(x))
        y = nn.hard_sigmoid(nn.Dense(8)(nn.relu(nn.Dense(2)(x.mean((1, 2))))))
        return nn.Conv(3, (1, 1))(x * y[:, None, None]).mean((1, 2))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        a = nn.relu(nn.Conv(4, (3, 3))(x))
        b = nn.relu(nn.Conv(6, (3, 3))(nn.max_pool(a, (2, 2), (2, 2))))
        b = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(b)
        c = nn.ConvTranspose(4, (3, 3), strides=(2, 2))(nn.max_pool(a, (2, 2), (2, 2)))
        return nn.Conv(2, (3, 3))(jnp.concatenate([a, b, c], -1))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(8, (4, 4), strides=4, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], 1)
        x += self.param("places", nn.initializers.normal(), (1, x.shape[1], 8))
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(2)(y, y)
        x += nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


class Audio(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(4, (9,), strides=4)(x))
        x = jnp.tanh(nn.Conv(6, (3,), kernel_dilation=2, padding="CAUSAL")(x))
        return nn.Dense(3)(x.mean(1))


def rotated(x: Any, places: Any) -> Any:
    """Rotary embeddings."""
    steps = 100.0 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = (places[:, None] * steps[None])[None, :, None]
    a, b = x[..., ::2], x[..., 1::2]
    turned = [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)]
    return jnp.stack(turned, -1).reshape(x.shape)


def llama(params: Any, tokens: Any, cache: Any, at: Any) -> Any:
    """Grouped queries with rotary embeddings, a cache, a gated MLP."""

    def norm(x: Any, scale: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]

    x = params["embedding"][tokens]
    batch, length, width = x.shape
    places = at + jnp.arange(length)
    written = {}
    for name, p in params["layers"].items():
        y = norm(x, p["norm"])
        heads = lambda w, y=y: (y @ w).reshape(batch, length, -1, 4)
        queries = rotated(heads(p["query"]), places).reshape(batch, length, -1, 2, 4)
        new = {"keys": rotated(heads(p["key"]), places), "values": heads(p["value"])}
        start = (0, at, 0, 0)
        stored = {k: jax.lax.dynamic_update_slice(cache[name][k], new[k], start) for k in new}
        scores = jnp.einsum("btkgd,bskd->bkgts", queries, stored["keys"]) / 2
        seen = jnp.arange(stored["keys"].shape[1])[None] <= places[:, None]
        scores = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -1e30))
        mixed = jnp.einsum("bkgts,bskd->btkgd", scores, stored["values"])
        x += mixed.reshape(batch, length, width) @ p["out"]
        y = norm(x, p["norm"])
        x += (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        written[name] = stored
    return {"logits": norm(x, params["norm"]) @ params["embedding"].T, "cache": written}


def llama_case(rng: np.random.Generator) -> Case:
    def matrix(*shape: int) -> np.ndarray:
        return drawn(rng, *shape) * np.float32(0.4)

    def layer() -> Any:
        sizes = {"query": (8, 8), "key": (8, 4), "value": (8, 4), "out": (8, 8)}
        sizes |= {"gate": (8, 12), "up": (8, 12), "down": (12, 8), "norm": (8,)}
        return {name: matrix(*size) for name, size in sizes.items()}

    layers = {"a": layer(), "b": layer()}
    cache = {k: {"keys": drawn(rng, 3, 9, 1, 4), "values": drawn(rng, 3, 9, 1, 4)} for k in layers}
    params = {"layers": layers, "embedding": matrix(16, 8), "norm": np.ones(8, np.float32)}
    return llama, params, (rng.integers(0, 16, (3, 2)).astype(np.int32), cache, np.int32(4))


def lstm_case(rng: np.random.Generator) -> Case:
    """Long enough to stay a loop."""

    def f(params: Any, x: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            hidden, cell = state
            sums = x @ params["in"] + hidden @ params["hidden"] + params["bias"][None]
            i, g, f, o = jnp.split(sums, 4, -1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        start = jnp.zeros((x.shape[0], 4))
        last, gathered = jax.lax.scan(step, (start, start), x.swapaxes(0, 1), reverse=True)
        return last[0], gathered.swapaxes(0, 1)

    params = {"in": drawn(rng, 3, 16), "hidden": drawn(rng, 4, 16), "bias": drawn(rng, 16)}
    return f, params, (drawn(rng, 3, 20, 3),)


def sums_case(rng: np.random.Generator) -> Case:
    def f(params: Any, x: Any) -> Any:
        x = jnp.cumsum(jnp.tile(x, (1, 2)) @ params["up"], -1)
        return jnp.maximum(x, params["bias"][None]) @ params["down"], jnp.argmax(x, -1)

    params = {"up": drawn(rng, 12, 8), "bias": drawn(rng, 8), "down": drawn(rng, 8, 3)}
    return f, params, (drawn(rng, 3, 6),)


def ours(model: Any, size: int, **options: Any) -> Callable[[np.random.Generator], Case]:
    options = {"train": False, **options}
    return lambda rng: linen(model, rng, drawn(rng, 3, size, size, 3), **options)


def images(model: nn.Module, size: int = 8) -> Callable[[np.random.Generator], Case]:
    return lambda rng: linen(model, rng, drawn(rng, 3, size, size, 3))


def of_framework(name: str) -> Callable[[np.random.Generator], Case]:
    """One of those whose products are found, at another batch than its own."""

    def made(rng: np.random.Generator) -> Case:
        f, params, inputs = frameworks.NETWORKS[name]()
        if name == "nnx_decoder":
            tokens = rng.integers(0, 16, (3, 3)).astype(np.int32)
            return f, params, (tokens, drawn(rng, 2, 3, 7, 1, 4), np.int32(2))
        return f, params, tuple(drawn(rng, 3, *x.shape[1:]) for x in inputs)

    return made


SMALL: dict[str, Any] = {"num_classes": 3, "cpu_convolutions": False}
NETWORKS: dict[str, Callable[[np.random.Generator], Case]] = {
    "GELU and LayerNorm": images(Pictures()),
    "ConvNeXt": images(ConvNeXt()),
    "Inception": images(Inception()),
    "MobileNet v3": images(MobileNetV3()),
    "U-Net": images(UNet()),
    "ViT": images(ViT()),
    "audio": lambda rng: linen(Audio(), rng, drawn(rng, 3, 40, 1)),
    "Llama": llama_case,
    "LSTM, a loop": lstm_case,
    "sums and tiles": sums_case,
    "BinaryNet": ours(BinaryNet(width=1 / 16, num_classes=3), 8, alpha=1.0),
    "BinaryNet, sign": ours(BinaryNet(width=1 / 16, num_classes=3, activation=sign), 8, alpha=1.0),
    "MobileNet": ours(MobileNet(width=1 / 16, stem=32, **SMALL), 8, alpha=1.0),
    "ResNet": ours(ResNet(stage_sizes=(1, 1), width=1 / 16, **SMALL), 8, alpha=1.0),
    "EfficientNet-Lite0": ours(EfficientNetLite(width=1 / 8, **SMALL), 32, alpha=1.0),
    **{name: of_framework(name) for name in frameworks.NETWORKS},
}
#: What the usual run leaves out: others of their kind stay in it.
LONG: Sequence[str] = (
    *("ConvNeXt", "Inception", "BinaryNet, sign", "MobileNet", "EfficientNet-Lite0"),
    *("linen_convolutions", "linen_lstm", "nnx_decoder", "plain_scan", "linen_scan_of_layers"),
    "nnx_einsum_and_attention",
)
#: Open axes that are not just the first.
OPEN_AXES: dict[str, Any] = {
    "Llama": ({0: "batch", 1: "length"}, {0: "batch", 1: "places"}, None),
    "nnx_decoder": ({0: "batch", 1: "length"}, {1: "batch", 2: "places"}, None),
    "LSTM, a loop": ({0: "batch", 1: "time"},),
}
