"""Networks of every framework as LiteRT files: their answers are JAX's, in floats and in codes."""

import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from jax import lax

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.export.litert import function_to_litert
from ab_jax.export.traced.quantized_operands import quantize_p
from ab_jax.products import ActivationRules, initial_ranges, quantize_inputs
from ab_jax.quantized import Quantized
from tests.export.exported_networks import (
    LONG,
    NETWORKS,
    OPEN_AXES,
    coded,
    dequantized,
    drawn,
    off_borders,
)
from tests.export.litert_answers import File, answers
from tests.export.onnx_answers import check_close, check_mostly, evaluate
from tests.export.test_onnx_function import KINDS, compiled_for, is_codes, mlp, of_kind

#: Frameworks take their time to make parameters; files of theirs have nothing that others have not.
LONG_HERE = {*LONG, "haiku_convolutions", "nnx_scan_of_layers"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n in LONG_HERE)) for n in NETWORKS],
)
def test_a_file_answers_as_its_network(name: str, rng: np.random.Generator) -> None:
    """At a batch that was never traced: with float weights, and with codes of 8 bits."""
    f, params, inputs = NETWORKS[name](rng)
    compiled = compiled_for(f, params, *inputs)
    axis = 0 if name.startswith("equinox") else -1
    for given in (params, coded(params, 8, axis)):
        data = function_to_litert(f, given, *inputs, open_axes=OPEN_AXES.get(name))
        found = answers(data, *inputs)
        check_close(found, compiled(dequantized(given), *inputs), relative=1e-4)
        check_codes(data, given)
    check_close(answers(data, *inputs, kernels="plain"), found, relative=1e-4)
    if name not in OPEN_AXES:  # the first of the batch alone
        first = answers(data, *(x[:1] for x in inputs))
        check_close(first, [x[:1] for x in found], relative=1e-4)


def check_codes(data: bytes, params: Any) -> None:
    """All weights that are codes lie in the file as these, and in no other way."""
    leaves = jax.tree.leaves(params, is_leaf=is_codes)
    codes = [leaf for leaf in leaves if is_codes(leaf)]
    file = File(data)
    stored = [
        name for name, t in file.tensors.items() if t.type == schema.TensorType.INT8 and t.buffer
    ]
    counts = [np.count_nonzero(file.constant(name)) for name in stored]
    # Layers of a scan may have equal parts, such as scales of norms.
    assert 0 <= sum(np.count_nonzero(leaf.codes) for leaf in codes) - sum(counts) <= 16
    told = file.metadata()["quantization"]["weights"]
    assert sorted(told.values()) == sorted(leaf.bits for leaf in codes)
    if codes:
        kept = sum(np.size(leaf) for leaf in leaves if not is_codes(leaf))
        biases = sum(leaf.codes.shape[-1] for leaf in codes)
        floats = [t for t in file.all_tensors if t.type == schema.TensorType.FLOAT32 and t.buffer]
        assert sum(np.prod(t.shape) for t in floats) <= kept + biases + 100


# Weights


@pytest.mark.parametrize("name", KINDS)
def test_codes_of_every_kind(name: str, rng: np.random.Generator) -> None:
    """By channel, by group, with zero points, with a scale for each digit."""
    up, down = of_kind(name, (16, 24), rng), of_kind(name, (8, 24), rng)
    codes = {"up": {"w": up, "b": drawn(rng, 24)}, "down": {"w": down}}
    x = drawn(rng, 3, 16)
    wanted = evaluate(lambda c, x: mlp(ab.dequantize(c), x), codes, x)
    for narrowest in (8, 2):
        data = function_to_litert(mlp, codes, x, narrowest=narrowest)
        check_close(answers(data, x), wanted)
        file = File(data)
        bits = next(b for b in (2, 4, 8) if b >= max(narrowest, up.bits))
        for path, leaf in (("up/w", up), ("down/w", down)):
            size = len(file.model.buffers[file.tensors[f"{path}/codes"].buffer].data)
            # Signs of 1 bit are -1 and 1, and digits of several scales are odd: a bit more.
            assert size <= leaf.codes.size * min(2 * bits, 8) / 8
    floats = [t for t in file.all_tensors if t.type == schema.TensorType.FLOAT32 and t.buffer]
    scales = sum(np.size(leaf.scale) for leaf in (up, down))
    assert sum(np.prod(t.shape) for t in floats) <= scales + 24 + 24 + 8 + 8


def test_tied_weights_lie_in_a_file_once(rng: np.random.Generator) -> None:
    """An embedding whose transpose gives the logits, as codes and as floats."""

    def f(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.tanh(params["embedding"][tokens]) @ params["embedding"].T

    params = {"embedding": drawn(rng, 32, 8)}
    tokens = rng.integers(0, 32, (3, 5)).astype(np.int32)
    for given, size in ((params, 32 * 8 * 4), (coded(params, 8, axis=0), 32 * 8)):
        data = function_to_litert(f, given, tokens)
        check_close(answers(data, tokens), evaluate(f, dequantized(given), tokens))
        model = File(data).model
        large = [b for b in model.buffers if b.data is not None and len(b.data) >= size]
        assert len(large) == 1


# Quantized inputs


QUANTIZED = {"GELU and LayerNorm": False, "ViT": True, "Llama": True, "ResNet": True}
QUANTIZED |= {"haiku_convolutions": True}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * long) for n, long in QUANTIZED.items()]
)
def test_quantized_inputs_are_those_of_jax(name: str, rng: np.random.Generator) -> None:
    f, params, inputs = NETWORKS[name](rng)
    codes = coded(params, 8)
    rules = ActivationRules([(r".*", ActivationQuantizer(bits=8, limit=127 / 32))])
    ranges = initial_ranges(f, rules, params, *inputs)
    data = function_to_litert(
        f, codes, *inputs, rules=rules, ranges=ranges, open_axes=OPEN_AXES.get(name)
    )
    dense = dequantized(codes)
    quantized = quantize_inputs(f, rules)
    wanted = compiled_for(lambda p, *xs: quantized(p, *xs, ranges=ranges)[0], dense, *inputs)
    plain = compiled_for(f, dense, *inputs)
    by_jax = wanted(dense, *inputs), plain(dense, *inputs)
    for kernels in ("fast", "plain"):
        check_mostly(answers(data, *inputs, kernels=kernels), *by_jax)
    told = File(data).metadata()["quantization"]
    assert set(told["inputs"].values()) == {8}


def test_tokens_have_scales_of_their_own(rng: np.random.Generator) -> None:
    params = {"w": drawn(rng, 6, 4)}
    x = drawn(rng, 3, 5, 6)
    x = off_borders(x, np.abs(x).max(-1, keepdims=True) / 7)
    rules = ActivationRules([("w", TokenQuantizer(bits=4))])
    data = function_to_litert(lambda p, x: x @ p["w"], params, x, rules=rules, ranges={})
    limit = np.abs(x.astype(np.float64)).max(-1, keepdims=True)
    wanted = np.rint(x * (7 / limit)) * limit / 7 @ params["w"]
    check_close(answers(data, x), np.float32(wanted))


def test_codes_stay_codes_between_layers(rng: np.random.Generator) -> None:
    """Pooled, padded and put in another order, since the channels are first here."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        x = lax.conv_general_dilated(x, params["a"], (1, 1), "SAME")
        x = jax.nn.relu(x + params["bias"])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = jax.nn.relu(lax.conv_general_dilated(x, params["b"], (1, 1), ((1, 1), (0, 1))))
        x = lax.conv_general_dilated(x, params["c"], (2, 2), "VALID")
        return x.reshape(x.shape[0], -1)

    params = {"a": drawn(rng, 6, 3, 3, 3) / 5, "b": drawn(rng, 4, 6, 2, 2) / 5}
    codes = coded(params | {"c": drawn(rng, 5, 4, 2, 2)}, 8, axis=0)
    codes["bias"] = drawn(rng, 1, 6, 1, 1)
    images = drawn(rng, 3, 3, 8, 8)
    signed, unsigned = (ActivationQuantizer(bits=8, signed=s, limit=4.0) for s in (True, False))
    rules = ActivationRules([("a", signed), (r".*", unsigned)])
    ranges = initial_ranges(f, rules, dequantized(codes), images)
    data = function_to_litert(f, codes, images, rules=rules, ranges=ranges)
    quantized = quantize_inputs(f, rules)
    wanted = evaluate(lambda p, x: quantized(p, x, ranges=ranges)[0], dequantized(codes), images)
    for kernels in ("fast", "plain"):
        (found,) = answers(data, images, kernels=kernels)
        assert np.abs(found - np.asarray(wanted)).mean() < 0.01 * np.abs(np.asarray(wanted)).max()
    file = File(data)
    of_codes = Counter(
        code
        for code, names in file.operators()
        if file.tensors[names[-1]].type == schema.TensorType.INT8
    )
    assert of_codes["CONV_2D"] == 2
    assert of_codes["MAX_POOL_2D"] == 1
    assert Counter(code for code, _ in file.operators())["QUANTIZE"] == 1


MOVES: dict[str, Any] = {
    "rev": lambda x: x[::-1, ::-1],
    "tile": lambda x: jnp.tile(x, (1, 2, 1)),
    "slice": lambda x: x[:, 1:3, ::2],
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x[:, :, None], (x.shape[0], 4, 3, 6)),
    "transpose": lambda x: x.transpose(0, 2, 1),
    "pad": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 2, 1), (1, 0, 0))),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_entries_moves_codes(name: str, rng: np.random.Generator) -> None:
    signed = ActivationQuantizer(bits=8, signed=True)

    def f(_: Any, x: jax.Array) -> jax.Array:
        return MOVES[name](quantize_p.bind(x, jnp.float32(2.5), quantizer=signed))

    x = off_borders(drawn(rng, 3, 4, 6), 2.5 / 127)
    data = function_to_litert(f, {}, x)
    codes = np.clip(np.rint(x.astype(np.float64) * 127 / 2.5), -127, 127)
    wanted = MOVES[name](jnp.asarray(codes * (2.5 / 127), jnp.float32))
    for kernels in ("fast", "plain"):
        check_close(answers(data, x, kernels=kernels), wanted)
    operators = [code for code, _ in File(data).operators()]
    assert operators[:2] == ["MAXIMUM", "QUANTIZE"]
    assert operators[-1] == "DEQUANTIZE"


# The entry


def test_names_shapes_and_metadata_of_a_file(rng: np.random.Generator) -> None:
    f = lambda p, x, tree: {"sum": x @ p["w"] + tree["a"], "rest": tree["b"]}
    params = coded({"w": drawn(rng, 4, 3)}, 4)
    inputs = drawn(rng, 2, 4), {"a": drawn(rng, 2, 3), "b": np.arange(3, dtype=np.int32)}
    axes = ({0: "batch"}, {"a": {0: "batch"}, "b": None})
    data = function_to_litert(f, params, *inputs, open_axes=axes, description={"of": 1})
    file = File(data)
    assert file.signature() == (["input0", "input1/a", "input1/b"], ["output/rest", "output/sum"])
    shapes = {
        name: (list(tensor.shape), tensor.shapeSignature)
        for name, tensor in file.tensors.items()
        if name.startswith("input")
    }
    assert shapes["input0"][0] == [1, 4]
    assert list(shapes["input0"][1]) == [-1, 4]
    assert list(shapes["input1/a"][1]) == [-1, 3]
    assert shapes["input1/b"] == ([3], None)
    metadata = file.metadata()
    assert metadata["source"] == {"ab_jax": ab.__version__, "jax": jax.__version__}
    assert metadata["quantization"] == {"weights": {"w": 4}, "inputs": {}}
    assert metadata["ab_jax"] == {"of": 1}
    assert data == function_to_litert(f, params, *inputs, open_axes=axes, description={"of": 1})
    wanted = f(jax.tree.map(jnp.asarray, dequantized(params)), *inputs)
    check_close(answers(data, *inputs), wanted)
    named = function_to_litert(
        f, params, *inputs, open_axes=axes, input_names=list("xyz"), output_names=["r", "s"]
    )
    assert File(named).signature() == (["x", "y", "z"], ["r", "s"])
    with pytest.raises(ValueError, match="2 input names for 3 inputs: 0, 1/a, 1/b"):
        function_to_litert(f, params, *inputs, input_names=["x", "y"])
    with pytest.raises(ValueError, match="not all different"):
        function_to_litert(f, params, *inputs, open_axes=axes, output_names=["input0", "s"])
    with pytest.raises(ValueError, match="would have no output"):
        function_to_litert(lambda params, *inputs: None, params, *inputs)


def test_outputs_may_be_inputs_constants_codes_and_one_value_twice(
    rng: np.random.Generator,
) -> None:
    params = coded({"w": drawn(rng, 4, 3)}, 8)

    def f(p: Any, x: jax.Array) -> Any:
        y = x * 2
        return x, y, y, p["w"], jnp.arange(3), jnp.zeros((x.shape[0], 2))

    x = drawn(rng, 3, 4)
    for kernels in ("fast", "plain"):
        found = answers(function_to_litert(f, params, x), x, kernels=kernels)
        check_close(found, f(jax.tree.map(jnp.asarray, dequantized(params)), jnp.asarray(x)))


def test_bools_and_strings_are_given_to_the_function(rng: np.random.Generator) -> None:
    f = lambda _, x, train, mode: x if train else {"twice": 2 * x}[mode]
    x = drawn(rng, 3)
    data = function_to_litert(f, {}, x, False, "twice")
    check_close(answers(data, x), 2 * x)
    assert File(data).signature()[0] == ["input0"]


# The page


def test_what_the_page_shows_is_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/litert.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"## A model of your own\n(.*?)\n## ", page, re.DOTALL)
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec(block, names)
    data = (tmp_path / "net.tflite").read_bytes()
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    assert isinstance(names["codes"]["up"], Quantized)
    wanted = names["forward"](ab.dequantize(names["codes"]), x)
    check_close(answers(data, x), wanted)
