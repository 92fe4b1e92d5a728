"""Networks of every framework as ONNX files: their answers are JAX's, in floats and in codes."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.export.onnx import function_to_onnx
from ab_jax.products import ActivationRules, initial_ranges, measure_ranges, quantize_inputs
from ab_jax.quantized import BinaryCoded, Quantized
from tests.export.exported_networks import (
    LONG,
    NETWORKS,
    OPEN_AXES,
    coded,
    dequantized,
    drawn,
    off_borders,
)
from tests.export.onnx_answers import answers, check_close, check_mostly, evaluate


def is_codes(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def compiled_for(f: Any, *arguments: Any) -> Any:
    """`f` compiled cheaply, since it runs but a few times."""
    flags = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(f).lower(*arguments).compile(flags)
    return lambda *given: run(*jax.tree.map(jnp.asarray, given))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in NETWORKS]
)
def test_a_file_answers_as_its_network(name: str, rng: np.random.Generator) -> None:
    """At a batch that was never traced: with float weights, and with codes of 8 and of 4 bits."""
    f, params, inputs = NETWORKS[name](rng)
    compiled = compiled_for(f, params, *inputs)
    axis = 0 if name.startswith("equinox") else -1
    for given in (params, coded(params, 8, axis), coded(params, 4, axis, zero_point=True)):
        model = function_to_onnx(f, given, *inputs, open_axes=OPEN_AXES.get(name))
        found = answers(model, *inputs)
        check_close(found, compiled(dequantized(given), *inputs))
        check_codes(model, given)
    if name not in OPEN_AXES:  # the first of the batch alone
        first = answers(model, *(x[:1] for x in inputs))
        check_close(first, [x[:1] for x in found])


def check_codes(model: onnx.ModelProto, params: Any) -> None:
    """All weights that are codes lie in the file as these."""
    codes = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_codes) if is_codes(leaf)]
    bits = {leaf.bits for leaf in codes}
    int4, int8 = onnx.TensorProto.INT4, onnx.TensorProto.INT8
    stored = {a.data_type for a in model.graph.initializer if "/codes" in a.name}
    assert stored == {int8 if b > 4 else int4 for b in bits}
    told = json.loads({p.key: p.value for p in model.metadata_props}["quantization"])
    assert len(told["weights"]) == len(codes)
    assert set(told["weights"].values()) == bits


# Weights


def mlp(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["up"]["w"] + params["up"]["b"][None])
    return x @ params["down"]["w"].T


def mlp_params(rng: np.random.Generator) -> Any:
    return {
        "up": {"w": drawn(rng, 16, 24), "b": drawn(rng, 24)},
        "down": {"w": drawn(rng, 8, 24)},
    }


def one(shape: Sequence[int]) -> tuple[int, ...]:
    return (1, 1)


def columns(shape: Sequence[int]) -> tuple[int, ...]:
    return (1, shape[1])


def rows(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], 1)


def groups(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0] // 4, shape[1])


def blocks(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0] // 4, shape[1] // 3)


def each(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], shape[1])


#: Bits, the shape of the scales, whether there are zero points, or scales for each bit.
KINDS: dict[str, tuple[int, Any, bool, bool]] = {
    "8 bits": (8, columns, False, False),
    "8 bits, one scale": (8, one, True, False),
    "8 bits, rows": (8, rows, True, False),
    "8 bits, groups": (8, groups, True, False),
    "8 bits, blocks": (8, blocks, True, False),
    "8 bits, each its own": (8, each, False, False),
    "5 bits, zero points": (5, columns, True, False),
    "4 bits": (4, columns, False, False),
    "4 bits, zero points": (4, columns, True, False),
    "4 bits, groups": (4, groups, True, False),
    "ternary": (2, columns, False, False),
    "2 bits, zero points": (2, groups, True, False),
    "1 bit": (1, one, False, False),
    "2 scales": (2, columns, False, True),
    "4 scales, groups": (4, groups, False, True),
}
IN_FUSED = {one, columns, rows, groups}


def of_kind(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Quantized:
    """Random codes and scales."""
    bits, blocks_of, affine, by_bit = KINDS[name]
    counts = blocks_of(shape)
    if by_bit:
        codes = rng.integers(0, 2**bits, shape) * 2 - (2**bits - 1)
        scale = rng.uniform(0.1, 1, (*counts, bits)).astype(np.float32)
        return BinaryCoded(codes.astype(np.int8), scale, None, bits, "float32")
    half = 2 ** (bits - 1)
    codes = rng.integers(-half if affine else 1 - half, half, shape)
    if bits == 1:
        codes = rng.choice([-1, 1], shape)
    zero = rng.integers(-half, half, counts).astype(np.int8) if affine else None
    scale = (rng.uniform(0.1, 1, counts) / half).astype(np.float32)
    return Quantized(codes.astype(np.int8), scale, zero, bits, "float32")


def exact_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """One in which a fused pair does not round activations to 8 bits."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", KINDS)
def test_codes_of_every_kind(name: str, fused: bool, rng: np.random.Generator) -> None:
    up, down = of_kind(name, (16, 24), rng), of_kind(name, (8, 24), rng)
    codes = {"up": {"w": up, "b": drawn(rng, 24)}, "down": {"w": down}}
    x = drawn(rng, 3, 16)
    model = function_to_onnx(mlp, codes, x, fused=fused)
    wanted = evaluate(lambda c, x: mlp(ab.dequantize(c), x), codes, x)
    found = exact_session(model).run(None, {"input0": x}) if fused else answers(model, x)
    check_close(found, wanted)
    operators = Counter(node.op_type for node in model.graph.node)
    pairs = 2 * (fused and KINDS[name][1] in IN_FUSED and not KINDS[name][3])
    assert operators["DequantizeLinear"] == pairs
    width = {1: 1, 2: 1.6 if "ternary" in name else 2, 3: 4, 4: 4}.get(up.bits, 8)
    for path, leaf in (("up/w", up), ("down/w", down)):
        arrays = [a for a in model.graph.initializer if a.name.startswith(path)]
        floats = [a for a in arrays if a.data_type == onnx.TensorProto.FLOAT]
        assert sum(np.prod(a.dims) for a in floats) <= leaf.scale.size
        (stored,) = [a for a in arrays if "/codes" in a.name or "/packed" in a.name]
        assert len(stored.raw_data) == np.ceil(leaf.codes.size * width / 8)


def test_fused_weights_are_exact_where_the_session_says_so(rng: np.random.Generator) -> None:
    params = coded(mlp_params(rng), 4)
    x = drawn(rng, 3, 16)
    model = function_to_onnx(mlp, params, x, fused=True)
    wanted = evaluate(mlp, dequantized(params), x)
    check_close(exact_session(model).run(None, {"input0": x}), wanted)


def test_a_sum_behind_a_fused_product_leaves_it_one_kernel(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Of a residual sum ONNX Runtime would make a product of floats."""
    params = {"w": drawn(rng, 64, 64)}
    f = lambda p, x: x + jnp.tanh(x) @ p["w"]
    codes = ab.quantize(params, ab.Rules([("w", ab.Uniform(bits=4, group_size=32))]))
    x = drawn(rng, 1, 64)
    model = function_to_onnx(f, codes, x, fused=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["MatMulNBits"] == 1
    assert not {"Gemm", "MatMul", "DequantizeLinear"} & operators.keys()
    wanted = evaluate(f, ab.dequantize(codes), x)
    check_close(exact_session(model).run(None, {"input0": x}), wanted)


def test_codes_stay_codes_through_layout_and_layers(rng: np.random.Generator) -> None:
    """Cut out of one array, transposed, put together, and handed out layer by layer by a scan."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        first, second = jnp.split(params["both"], 2, axis=1)
        x = x @ jnp.concatenate([second, first], 1).reshape(6, 2, 4).transpose(0, 2, 1)[:, :3, 1]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    params = {"both": drawn(rng, 6, 8), "layers": drawn(rng, 3, 3, 3)}
    codes = coded(params, 8, axis=0)
    x = drawn(rng, 3, 6)
    model = function_to_onnx(f, codes, x)
    check_close(answers(model, x), evaluate(f, dequantized(codes), x))
    check_codes(model, codes)
    floats = [a for a in model.graph.initializer if a.data_type == onnx.TensorProto.FLOAT]
    assert all(np.prod(a.dims) <= 6 for a in floats)


def test_tied_weights_lie_in_a_file_once(rng: np.random.Generator) -> None:
    """An embedding whose transpose gives the logits, as codes and as floats."""

    def f(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.tanh(params["embedding"][tokens]) @ params["embedding"].T

    params = {"embedding": drawn(rng, 32, 8)}
    tokens = rng.integers(0, 32, (3, 5)).astype(np.int32)
    for given, size in ((params, 32 * 8 * 4), (coded(params, 8, axis=0), 32 * 8)):
        model = function_to_onnx(f, given, tokens)
        check_close(answers(model, tokens), evaluate(f, dequantized(given), tokens))
        arrays = [a for a in model.graph.initializer if len(a.raw_data) >= size]
        assert [len(a.raw_data) for a in arrays] == [size]


# Quantized inputs


def quantized_case(name: str, rng: np.random.Generator, bits: int) -> Any:
    """A network with quantized weights and inputs: as a function of its inputs, and its rules."""
    f, params, inputs = NETWORKS[name](rng)
    axis = 0 if name.startswith("equinox") else -1
    codes = coded(params, 8, axis)
    rules = ActivationRules([(r".*", ActivationQuantizer(bits=bits, limit=127 / 32))])
    ranges = initial_ranges(f, rules, params, *inputs)
    return f, codes, inputs, rules, ranges


NAMES_QUANTIZED = {
    "GELU and LayerNorm": False,
    "ViT": True,
    "Llama": True,
    "LSTM, a loop": False,
    "ResNet": True,
    "equinox_attention": False,
    "linen_scan_of_layers": True,
    "haiku_convolutions": True,
    "nnx_scan_of_layers": True,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * long) for n, long in NAMES_QUANTIZED.items()],
)
def test_quantized_inputs_are_those_of_jax(name: str, rng: np.random.Generator) -> None:
    f, codes, inputs, rules, ranges = quantized_case(name, rng, 8)
    model = function_to_onnx(
        f, codes, *inputs, rules=rules, ranges=ranges, open_axes=OPEN_AXES.get(name)
    )
    dense = dequantized(codes)
    quantized = quantize_inputs(f, rules)
    wanted = compiled_for(lambda p, *xs: quantized(p, *xs, ranges=ranges)[0], dense, *inputs)
    plain = compiled_for(f, dense, *inputs)
    check_mostly(answers(model, *inputs), wanted(dense, *inputs), plain(dense, *inputs))
    told = json.loads({p.key: p.value for p in model.metadata_props}["quantization"])
    assert told["inputs"]
    assert set(told["inputs"].values()) == {8}


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_one_input(bits: int, signed: bool, rng: np.random.Generator) -> None:
    """Each of its own range, by percentiles or maxima, over both ends of it."""
    params = {"w": drawn(rng, 6, 4)}
    f = lambda p, x: x @ p["w"]
    x = drawn(rng, 64, 6)
    quantizer = ActivationQuantizer(bits=bits, signed=signed, percentile=95.0)
    rules = ActivationRules([("w", quantizer)])
    ranges = measure_ranges(f, rules, params, [(np.abs(x),)])
    model = function_to_onnx(f, coded(params, 8), x, rules=rules, ranges=ranges)
    limit = np.float64(ranges["w"].limit)
    lowest, highest = quantizer.levels
    levels = np.clip(np.rint(x.astype(np.float64) * highest / limit), lowest, highest)
    weights = dequantized(coded(params, 8))["w"].astype(np.float64)
    wanted = (levels * (limit / highest)) @ weights
    (found,) = answers(model, x)
    close = np.abs(found - wanted) < 1e-5 * np.abs(wanted).max()
    assert close.all(axis=1).mean() > 0.95


def test_tokens_have_scales_of_their_own(rng: np.random.Generator) -> None:
    params = {"w": drawn(rng, 6, 4)}
    f = lambda p, x: x @ p["w"]
    x = drawn(rng, 3, 5, 6)
    x = off_borders(x, np.abs(x).max(-1, keepdims=True) / 7)
    rules = ActivationRules([("w", TokenQuantizer(bits=4))])
    model = function_to_onnx(f, params, x, rules=rules, ranges={})
    limit = np.abs(x.astype(np.float64)).max(-1, keepdims=True)
    wanted = np.rint(x * (7 / limit)) * limit / 7 @ params["w"]
    check_close(answers(model, x), np.float32(wanted))


def test_layers_with_quantized_inputs_run_in_integers(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """ONNX Runtime makes one kernel of codes, weights and their product."""
    params = mlp_params(rng)
    x = drawn(rng, 3, 16)
    rules = ActivationRules([(r".*", ActivationQuantizer(bits=8, limit=4.0))])
    ranges = initial_ranges(mlp, rules, params, x)
    for bits in (8, 4, 2):
        codes = {"up": coded(params["up"], bits), "down": coded(params["down"], bits, axis=0)}
        model = function_to_onnx(mlp, codes, x, rules=rules, ranges=ranges)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options)
        operators = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
        assert operators["MatMulIntegerToFloat"] == 2, operators
        assert not {"DequantizeLinear", "MatMul", "Gemm", "QGemm"} & operators.keys()


# The entry


def test_names_shapes_and_metadata_of_a_file(rng: np.random.Generator) -> None:
    f = lambda p, x, tree: {"sum": x @ p["w"] + tree["a"], "rest": tree["b"]}
    params = coded({"w": drawn(rng, 4, 3)}, 4)
    inputs = drawn(rng, 2, 4), {"a": drawn(rng, 2, 3), "b": np.arange(3)}
    axes = ({0: "batch"}, {"a": {0: "batch"}, "b": None})
    told = {"class_names": ["a", "b", "c"], "mean": [0.5], "std": [0.2], "description": {"of": 1}}
    model = function_to_onnx(f, params, *inputs, open_axes=axes, **told)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        **{"input0": ["batch", 4], "input1/a": ["batch", 3], "input1/b": [3]},
        **{"output/rest": [3], "output/sum": ["batch", 3]},
    }
    metadata = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert metadata.pop("source") == {"ab_jax": ab.__version__, "jax": jax.__version__}
    assert metadata.pop("quantization") == {"weights": {"w": 4}, "inputs": {}}
    assert metadata == {
        **{"class_names": ["a", "b", "c"], "mean": [0.5], "std": [0.2], "network": {"of": 1}}
    }
    again = function_to_onnx(f, params, *inputs, open_axes=axes, **told)
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(
        deterministic=True
    )
    named = function_to_onnx(
        f, params, *inputs, open_axes=axes, input_names=list("xyz"), output_names=["r", "s"]
    )
    assert [value.name for value in named.graph.input] == ["x", "y", "z"]
    assert [value.name for value in named.graph.output] == ["r", "s"]
    with pytest.raises(ValueError, match="2 input names for 3 inputs: 0, 1/a, 1/b"):
        function_to_onnx(f, params, *inputs, input_names=["x", "y"])
    with pytest.raises(ValueError, match="not all different"):
        function_to_onnx(f, params, *inputs, open_axes=axes, output_names=["input0", "s"])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["x", "x"], r"\['x', 'x', 'output'\] of inputs and outputs are not all different"),
        (["x", ""], r"input names \['x', ''\] are not all texts"),
        ([1, 2], r"input names \[1, 2\] are not all texts"),
    ],
)
def test_names_that_are_none_or_not_different_are_refused(names: Any, told: str) -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=told):
        function_to_onnx(lambda _, x, y: x + y, {}, x, x, input_names=names)


def test_a_function_that_returns_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="would have no output"):
        function_to_onnx(lambda _, x: None, {}, np.ones((2, 3), np.float32))


@pytest.mark.parametrize("name", ["w/codes", "w/scale"])
def test_an_output_may_have_the_name_of_an_inner_value(rng: np.random.Generator, name: str) -> None:
    params = ab.quantize({"w": drawn(rng, 3, 3)}, ab.Rules([("w", ab.Uniform(bits=4))]))
    x = drawn(rng, 2, 3)
    model = function_to_onnx(lambda params, x: x @ params["w"], params, x, output_names=[name])
    assert [value.name for value in model.graph.output] == [name]
    check_close(answers(model, x), x @ np.asarray(ab.dequantize(params)["w"]))


def test_outputs_may_be_inputs_constants_codes_and_one_value_twice(
    rng: np.random.Generator,
) -> None:
    params = coded({"w": drawn(rng, 4, 3)}, 8)

    def f(p: Any, x: jax.Array) -> Any:
        y = x * 2
        return x, y, y, p["w"], jnp.arange(3), jnp.zeros((x.shape[0], 2))

    x = drawn(rng, 3, 4)
    found = answers(function_to_onnx(f, params, x), x)
    check_close(found, f(jax.tree.map(jnp.asarray, dequantized(params)), jnp.asarray(x)))


def test_bools_and_strings_are_given_to_the_function(rng: np.random.Generator) -> None:
    f = lambda _, x, train, mode: x if train else {"twice": 2 * x}[mode]
    x = drawn(rng, 3)
    model = function_to_onnx(f, {}, x, False, "twice")
    check_close(answers(model, x), 2 * x)
    assert len(model.graph.input) == 1


# The page


def test_what_the_page_shows_is_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/deploy.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"## A model of your own\n(.*?)\n## ", page, re.DOTALL)
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        for block in blocks:
            exec(block, names)
    x = np.ones((5, 16), np.float32)
    wanted = names["forward"](ab.dequantize(names["codes"]), x)
    check_close([names["scores"]], wanted)
    (found,) = answers(names["net"], x)
    quantized = quantize_inputs(names["forward"], names["inputs"])
    dense = ab.dequantize(names["codes"])
    check_close([found], quantized(dense, x, ranges=names["ranges"])[0], relative=2e-2)
