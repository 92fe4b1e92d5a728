"""What integers are worth for transformers in ONNX Runtime: latency and size against float32.

    python -m benchmarks.deploy_transformers        (some three minutes on a core)

Plain functions of random weights, as anybody's network is exported (`function_to_onnx`): ViT-Ti
(arXiv 2012.12877, table 1) on one image, weights and inputs of all products at 8 bits; and a
decoder of Llama's kind with 109 million weights that takes one token after 255 others, its matrices
at 4 bits with a scale for each 32 rows, activations in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.onnx import function_to_onnx
from ab_jax.products import ActivationRules, measure_ranges, quantize_inputs
from benchmarks.measuring.benchmark_command import (
    Record,
    main,
    recorded,
    require_at_least_one,
    versions,
)
from benchmarks.measuring.ratios import in_rounds, markdown, over_rounds, ratio_cells, timed

_WIDTH, _DEPTH, _HEADS, _PATCH, _IMAGE = 192, 12, 3, 16, 224  # of ViT-Ti
_VOCABULARY, _LLAMA_WIDTH, _HIDDEN, _LAYERS, _HEAD_SIZE, _PLACES = 8192, 1024, 2816, 8, 64, 256

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How often to time, and where to write the record."""

    rounds: int = 15  # measurements of each, after a round to warm up
    repeats: int = 5  # runs in a row in a measurement
    seed: int = 0  # of the order in which a round runs them
    out: Path = Path("results/bench_deploy_transformers/one_core.json")


def vit(params: Params, images: jax.Array) -> jax.Array:
    """Logits of images [batch, 224, 224, 3]."""
    batch, side = images.shape[0], _IMAGE // _PATCH
    x = images.reshape(batch, side, _PATCH, side, _PATCH, 3).swapaxes(2, 3)
    x = x.reshape(batch, side * side, -1) @ params["patches"]
    token = jnp.broadcast_to(params["token"], (batch, 1, _WIDTH))
    x = jnp.concatenate([token, x], 1) + params["places"]
    for p in params["layers"]:
        q, k, v = jnp.unstack(jnp.einsum("btw,wnhd->nbthd", _layer_norm(x, p["norm"]), p["qkv"]))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(_WIDTH / _HEADS)
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        x = x + y.reshape(x.shape) @ p["out"]
        y = _layer_norm(x, p["mlp_norm"]) @ p["up"] + p["up_bias"]
        x = x + jax.nn.gelu(y, approximate=False) @ p["down"] + p["down_bias"]
    return _layer_norm(x, params["norm"])[:, 0] @ params["head"]


def _layer_norm(x: jax.Array, scale_and_bias: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    unit = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    return unit * scale_and_bias[0] + scale_and_bias[1]


def vit_params(rng: np.random.Generator) -> Params:
    """Random ones."""
    tokens = (_IMAGE // _PATCH) ** 2 + 1

    def norm() -> Any:
        bias = 0.1 * rng.standard_normal((1, 1, _WIDTH))
        return np.stack([np.ones((1, 1, _WIDTH)), bias]).astype(np.float32)

    def layer() -> Params:
        size = _WIDTH // _HEADS
        return {
            "norm": norm(),
            "mlp_norm": norm(),
            "qkv": _matrix(rng, _WIDTH, 3, _HEADS, size),
            "out": _matrix(rng, _WIDTH, _WIDTH),
            "up": _matrix(rng, _WIDTH, 4 * _WIDTH),
            "up_bias": 0.1 * _matrix(rng, 1, 1, 4 * _WIDTH),
            "down": _matrix(rng, 4 * _WIDTH, _WIDTH),
            "down_bias": 0.1 * _matrix(rng, 1, 1, _WIDTH),
        }

    return {
        "patches": _matrix(rng, 3 * _PATCH**2, _WIDTH),
        "token": _matrix(rng, 1, 1, _WIDTH),
        "places": 0.1 * _matrix(rng, 1, tokens, _WIDTH),
        "layers": [layer() for _ in range(_DEPTH)],
        "norm": norm(),
        "head": _matrix(rng, _WIDTH, 1000),
    }


def decoder(params: Params, token: jax.Array, cache: Params) -> tuple[jax.Array, Params]:
    """Logits [1, vocabulary] and the new keys and values, for a token [1] behind those in a cache.

    Keys and values lie in arrays [2, layers, places, heads, size]; the last place is the token's.
    """
    x = params["embedding"][token]
    new = []
    for i, p in enumerate(params["layers"]):
        q, k, v = (
            _turned((_rms_norm(x, p["norm"]) @ p[name]).reshape(1, -1, _HEAD_SIZE), name != "value")
            for name in ("query", "key", "value")
        )
        keys, values = (jnp.concatenate([old[i], x]) for old, x in zip(cache, (k, v), strict=True))
        scores = jnp.einsum("thd,shd->hts", q, keys) / np.sqrt(_HEAD_SIZE)
        y = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), values)
        x = x + y.reshape(x.shape) @ p["out"]
        y = _rms_norm(x, p["mlp_norm"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        new.append(jnp.stack([k, v]))
    return _rms_norm(x, params["norm"]) @ params["logits"], jnp.stack(new)


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def _turned(x: jax.Array, rotary: bool) -> jax.Array:
    """By the angles of the last place, where they are rotated."""
    if not rotary:
        return x
    angles = (_PLACES - 1) * 1e4 ** (-np.arange(0, _HEAD_SIZE, 2) / _HEAD_SIZE)
    cos, sin = (f(angles)[None, None].astype(np.float32) for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def decoder_params(rng: np.random.Generator) -> Params:
    """Random ones."""
    width = _LLAMA_WIDTH
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"gate": (width, _HIDDEN), "up": (width, _HIDDEN), "down": (_HIDDEN, width)}

    def layer() -> Params:
        norms = {name: np.ones((1, width), np.float32) for name in ("norm", "mlp_norm")}
        return norms | {name: _matrix(rng, *shape) for name, shape in shapes.items()}

    return {
        "embedding": _matrix(rng, _VOCABULARY, width),
        "layers": [layer() for _ in range(_LAYERS)],
        "norm": np.ones((1, width), np.float32),
        "logits": _matrix(rng, width, _VOCABULARY),
    }


def _matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network as files, with what they are fed.

    Attributes:
      inputs: by their names.
      files: by what they compute in; float32 comes first.
      settings: of the sessions of some.
      wanted: what JAX answers of the quantized network.
    """

    inputs: dict[str, np.ndarray]
    files: dict[str, bytes]
    settings: dict[str, dict[str, str]]
    wanted: Any


def vit_subject() -> Subject:
    """ViT-Ti in float32, and with 8-bit weights and inputs."""
    rng = np.random.default_rng(0)
    params, images = vit_params(rng), rng.standard_normal((1, _IMAGE, _IMAGE, 3), np.float32)
    rules = ab.Rules(
        [
            (r".*(qkv|out|up|down|patches|head)", ab.Uniform(bits=8, scale="absmax")),
            (r".*", None),
        ]
    )
    inputs = ActivationRules([(r".*", ActivationQuantizer(bits=8))])
    ranges = measure_ranges(vit, inputs, params, [(images,)])
    names: dict[str, Any] = {"input_names": ["images"]}
    codes = ab.quantize(params, rules)
    files = {
        "float32": function_to_onnx(vit, params, images, **names),
        "W8A8": function_to_onnx(vit, codes, images, rules=inputs, ranges=ranges, **names),
    }
    quantized = quantize_inputs(vit, inputs)
    wanted = jax.jit(quantized)(ab.dequantize(codes), images, ranges=ranges)[0]
    return Subject({"images": images}, _written(files), {}, np.asarray(wanted))


def decoder_subject() -> Subject:
    """The decoder in float32, and with 4-bit matrices."""
    params, inputs = decoder_params(np.random.default_rng(0)), decoder_inputs()
    codes = ab.quantize(params, decoder_rules(ab.Uniform(bits=4, scale="absmax", group_size=32)))
    written = {
        "float32": decoder_to_file(params, inputs),
        "W4": decoder_to_file(codes, inputs, fused=True),
    }
    # The same file: ONNX Runtime rounds activations to 8 bits unless it is told not to.
    written["W4, activations in 8 bits"] = written["W4"]
    exact = {"session.qdq_matmulnbits_accuracy_level": "0"}
    wanted = jax.jit(decoder)(ab.dequantize(codes), *inputs)[0]
    return Subject(named(inputs), written, {"W4": exact}, np.asarray(wanted))


def decoder_inputs() -> tuple[Any, Any]:
    """A token, and keys and values of those before it."""
    rng = np.random.default_rng(1)
    shape = (_LAYERS, _PLACES - 1, _LLAMA_WIDTH // _HEAD_SIZE, _HEAD_SIZE)
    return np.array([7], np.int32), tuple(rng.standard_normal(shape, np.float32) for _ in range(2))


def named(inputs: tuple[Any, Any]) -> dict[str, np.ndarray]:
    """The decoder's inputs by their names in a file."""
    token, (keys, values) = inputs
    return {"token": token, "keys": keys, "values": values}


def decoder_rules(quantizer: ab.Quantizer) -> ab.Rules:
    """Of all matrices but the embedding."""
    return ab.Rules([(r".*norm|embedding", None), (r".*", quantizer)])


def decoder_to_file(params: Params, inputs: tuple[Any, Any], *, fused: bool = False) -> bytes:
    """The decoder as an ONNX file."""
    return function_to_onnx(
        decoder,
        params,
        *inputs,
        fused=fused,
        input_names=list(named(inputs)),
        open_axes=(None, None),
    ).SerializeToString()


def _written(files: dict[str, Any]) -> dict[str, bytes]:
    return {name: file.SerializeToString() for name, file in files.items()}


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "ViT-Ti, one image": vit_subject,
    "decoder of 109 M weights, one token": decoder_subject,
}


@recorded("benchmarks.deploy_transformers")
def run(config: Config) -> Record:
    """Time the networks, on one core."""
    require_at_least_one(config, "rounds", "repeats")
    seconds, sizes, apart = {}, {}, {}
    for name, make in SUBJECTS.items():
        subject = make()
        runs = {
            form: one_core_session(data, subject.settings.get(form, {}))
            for form, data in subject.files.items()
        }
        answers = {form: of(None, subject.inputs)[0] for form, of in runs.items()}
        apart[name] = {
            form: float(np.abs(found - subject.wanted).mean() / np.abs(subject.wanted).mean())
            for form, found in answers.items()
        }
        sizes[name] = {form: len(data) for form, data in subject.files.items()}
        calls = {
            form: functools.partial(seconds_of, of, subject.inputs, config.repeats)
            for form, of in runs.items()
        }
        seconds[name] = in_rounds(calls, rounds=config.rounds, seed=config.seed)
    return {
        "onnxruntime": onnxruntime.__version__,
        "bytes": sizes,
        "apart": apart,
        "seconds": seconds,
    }


def one_core_session(data: bytes, settings: dict[str, str]) -> Callable[..., Any]:
    """ONNX Runtime's `run(output names, inputs)` of a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    run: Callable[..., Any] = session.run
    return run


def seconds_of(call: Callable[..., Any], inputs: dict[str, np.ndarray], repeats: int) -> float:
    """Of a call, mean of some in a row."""
    return timed(lambda: [call(None, inputs) for _ in range(repeats)]).wall / repeats


def table(records: Sequence[Record]) -> str:
    """The Markdown table of a record: ratios to float32, and how far answers lie apart."""
    (record,) = records
    rows = []
    for name, by_form in record["seconds"].items():
        ratios = ratio_cells(by_form, lambda s: f"{1e3 * s:.1f} ms", digits=2)
        sizes, apart = record["bytes"][name], record["apart"][name]
        for form in by_form:
            first = form == "float32"
            size = (
                f"1 ({sizes[form] / 1e6:.1f} MB)"
                if first
                else f"{sizes[form] / sizes['float32']:.3f}"
            )
            rows.append([name, form, size, ratios[form], "" if first else f"{apart[form]:.1e}"])
    caption = (
        f"Time / float32: {over_rounds(records)}; {record['hardware']}; "
        f"{versions(record, {'onnxruntime': record['onnxruntime']})}. `apart`: the mean difference "
        f"of answers from JAX's of the same codes, over their mean size."
    )
    head = ["network", "form", "file", "time on one core", "apart"]
    return f"{markdown(head, rows, left=2)}\n\n{caption}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
