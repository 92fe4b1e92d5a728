"""Networks as ONNX files: our integers inside, our logits in ONNX Runtime, fused where it can."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from ab_jax.activations import ActivationQuantizer
from ab_jax.data.augment import normalize
from ab_jax.export.graph.early_quantization import quantize_early
from ab_jax.export.graph.fold import fold_batch_norm
from ab_jax.export.graph.known_networks import describe
from ab_jax.export.graph.operations import (
    Add,
    Clip,
    Convolution,
    Dense,
    Graph,
    MaxPool,
    Mean,
    Node,
    Quantize,
    evaluate,
)
from ab_jax.export.onnx import to_onnx
from ab_jax.quantizers import Quantized
from tests.export.small_networks import NETWORKS, make

#: The layers of each network, as ONNX Runtime fuses them. In float32 are those whose inputs are no
#: codes (signs), depthwise ones, and kernels of few channels.
FUSED = {
    "binarynet": {"MatMulIntegerToFloat": 8, "Conv": 1},
    "binarynet, sign": {"Conv": 6, "Gemm": 3},
    "mobilenet": {"MatMulIntegerToFloat": 14, "Conv": 14},
    "resnet v1": {"MatMulIntegerToFloat": 11, "Conv": 2},
    "resnet v1, keras": {"MatMulIntegerToFloat": 11, "Conv": 2},
    "resnet v2": {"MatMulIntegerToFloat": 11, "Conv": 2},
    "resnet v2, keras": {"MatMulIntegerToFloat": 11, "Conv": 2},
    "resnet, basic": {"MatMulIntegerToFloat": 5, "Conv": 1},
}
FUSED_WITH_INTEGER_BIASES = {
    "binarynet": {"QLinearConv": 3, "MatMulIntegerToFloat": 6},
    "mobilenet": {"QLinearConv": 26, "MatMulIntegerToFloat": 2},
    "resnet v1": {"QLinearConv": 6, "MatMulIntegerToFloat": 6, "Conv": 1},
}


def layers_of(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if isinstance(node.operation, Convolution | Dense)]


def run(graph: Graph, images: Any) -> np.ndarray:
    """Logits in float32; compiled cheaply, since it runs but once."""
    flags = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    images = jnp.asarray(images)
    compiled = jax.jit(lambda x: evaluate(graph, x)).lower(images).compile(flags)
    return np.asarray(compiled(images))


def session(model: onnx.ModelProto, optimized: Path | None = None) -> Any:
    """As users run it; or, to see what is fused, without what depends on the processor."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Processors without VNNI saturate sums of two products of 8 bits, but for this.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(optimized)
    data = model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def fused(model: onnx.ModelProto, folder: Path) -> dict[str, int]:
    """How many layers become what in ONNX Runtime."""
    session(model, folder / "optimized.onnx")
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    operators = Counter(node.op_type.removeprefix("Fused") for node in nodes)
    assert not {"DequantizeLinear", "ConvInteger", "QGemm"} & operators.keys()
    layers = ("QLinearConv", "MatMulIntegerToFloat", "Conv", "Gemm", "MatMul")
    return {name: operators[name] for name in layers if operators[name]}


def arrays_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {array.name: numpy_helper.to_array(array) for array in model.graph.initializer}


def check_integers(graph: Graph, arrays: dict[str, np.ndarray]) -> int:
    """Compare each code, scale and zero point of the folded graph with those in a file."""
    compared = 0
    for node in graph.nodes:
        layer = node.operation
        if node.name == "flatten":
            flattened = graph.nodes[node.inputs[0] - 1].shape
        if not isinstance(layer, Convolution | Dense) or not isinstance(layer.kernel, Quantized):
            continue
        name, kernel = node.name, layer.kernel
        found = arrays.get(f"{name}/kernel", arrays.get(f"{name}/kernel_int4")).astype(np.int8)
        codes = np.asarray(kernel.codes)
        if found.ndim == 4:
            found = np.moveaxis(found, (0, 1), (3, 2))
        elif codes.ndim == 4:
            found = found.reshape(codes.shape)
        elif name == "dense0":
            height, width, channels = flattened
            rows = found.reshape(channels, height, width, -1)
            found = np.moveaxis(rows, 0, 2).reshape(found.shape)
        np.testing.assert_array_equal(found, codes)
        scale = arrays[f"{name}/kernel_scale"]
        np.testing.assert_array_equal(
            scale.reshape(-1), np.broadcast_to(np.asarray(kernel.scale).reshape(-1), scale.size)
        )
        if kernel.zero_point is not None:
            zeros = arrays[f"{name}/kernel_zero_point"].reshape(-1)
            np.testing.assert_array_equal(zeros, np.asarray(kernel.zero_point).reshape(-1))
        compared += 1
    return compared


def with_whole_biases(graph: Graph, arrays: dict[str, np.ndarray]) -> Graph:
    """The graph with biases as the file's integers have them, which are the nearest to its own."""
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        whole = arrays.get(f"{node.name}/bias")
        if whole is None or whole.dtype != np.int32:
            continue
        assert isinstance(node.operation, Convolution | Dense)
        unit = arrays[f"{node.name}/bias_scale"].astype(np.float64)
        bias = whole * unit
        apart = np.abs(bias - np.asarray(node.operation.bias))
        assert (apart <= 0.5001 * unit).all()
        layer = dataclasses.replace(node.operation, bias=jnp.asarray(bias, jnp.float32))
        nodes[i] = dataclasses.replace(node, operation=layer)
    return dataclasses.replace(graph, nodes=tuple(nodes))


@pytest.mark.parametrize(
    ("name", "integer_biases"),
    [
        (name, False)
        if name in ("binarynet", "mobilenet")
        else pytest.param(name, False, marks=pytest.mark.long)
        for name in NETWORKS
    ]
    + [pytest.param(name, True, marks=pytest.mark.long) for name in FUSED_WITH_INTEGER_BIASES],
)
def test_onnx_runtime_computes_our_network_with_our_integers(
    rng: np.random.Generator, name: str, integer_biases: bool, tmp_path: Path
) -> None:
    model, variables, shape = make(name, rng)
    graph = fold_batch_norm(describe(model, variables, shape))
    file = to_onnx(graph, integer_biases=integer_biases)
    onnx.checker.check_model(file, full_check=True)
    arrays = arrays_of(file)
    assert check_integers(graph, arrays) == len(layers_of(graph))
    images = rng.normal(size=(24, *shape)).astype(np.float32)
    rounded = with_whole_biases(graph, arrays)
    assert (rounded.nodes != graph.nodes) == integer_biases
    expected = run(rounded, images)
    running = session(file)
    (found,) = running.run(None, {"images": images})
    assert found.dtype == np.float32
    apart = np.max(np.abs(found - expected), axis=1) / np.ptp(expected)
    # Sums in another order: a float in its last bits, and so, seldom, a code in its next step. That
    # moves an image's logits by a share of one step's, of which a range of 4 bits has 15.
    assert np.mean(apart < 1e-5) > 0.6
    assert np.max(apart) < 1 / 15
    expected_kernels = FUSED_WITH_INTEGER_BIASES if integer_biases else FUSED
    assert fused(file, tmp_path) == expected_kernels[name]
    for count in (1, 5):
        (few,) = running.run(None, {"images": images[:count]})
        np.testing.assert_allclose(few, found[:count], rtol=0, atol=1e-5 * np.ptp(found))


# Graphs by hand


def node(name: str, operation: Any, inputs: tuple[int, ...], *shape: int) -> Node:
    return Node(name, operation, inputs, shape)


def quantized(rng: np.random.Generator, *shape: int, bits: int = 4, group: int = 0) -> Quantized:
    highest = 2 ** (bits - 1) - 1
    codes = rng.integers(-highest, highest + 1, shape).astype(np.int8)
    blocks = [1] * len(shape[:-1])
    if group:
        blocks[-1] = shape[-2] // group
    scale = rng.uniform(0.05, 0.1, (*blocks, shape[-1])) / np.sqrt(np.prod(shape[:-1]))
    return Quantized(jnp.asarray(codes), jnp.asarray(scale, jnp.float32), None, bits, "float32")


def block(rng: np.random.Generator, limits: tuple[float, float] = (1.0, 1.0)) -> Graph:
    """A stem with a pool, whose output two layers take, in codes up to these limits."""
    same, none = ((1, 1), (1, 1)), ((0, 0), (0, 0))
    images = ActivationQuantizer(bits=4, signed=True)
    codes = ActivationQuantizer(bits=3, signed=False)

    def bias(n: int) -> jax.Array:
        return jnp.asarray(rng.normal(scale=0.2, size=n), jnp.float32)

    stem = Convolution(quantized(rng, 3, 3, 3, 8), bias(8), (1, 1), same)
    depthwise = Convolution(quantized(rng, 3, 3, 1, 8), bias(8), (2, 2), same, groups=8)
    shortcut = Convolution(quantized(rng, 1, 1, 8, 12), bias(12), (2, 2), none)
    last = Convolution(quantized(rng, 1, 1, 8, 12), None, (1, 1), none)
    head = Dense(quantized(rng, 12, 4, bits=8), bias(4))
    return Graph(
        (
            node("images", Quantize(images, 2.0), (0,), 12, 12, 3),
            node("stem", stem, (1,), 12, 12, 8),
            node("relu", Clip(float("inf")), (2,), 12, 12, 8),
            node("pool", MaxPool((3, 3), (2, 2), ((0, 1), (0, 1)), 0.0), (3,), 6, 6, 8),
            node("a", Quantize(codes, limits[0]), (4,), 6, 6, 8),
            node("b", Quantize(codes, limits[1]), (4,), 6, 6, 8),
            node("depthwise", depthwise, (5,), 3, 3, 8),
            node("relu6", Clip(6.0), (7,), 3, 3, 8),
            node("c", Quantize(codes, 1.5), (8,), 3, 3, 8),
            node("last", last, (9,), 3, 3, 12),
            node("shortcut", shortcut, (6,), 3, 3, 12),
            node("sum", Add(), (10, 11), 3, 3, 12),
            node("mean", Mean(), (12,), 12),
            node("d", Quantize(ActivationQuantizer(bits=8, signed=True), 1.0), (13,), 12),
            node("head", head, (14,), 4),
        ),
        (12, 12, 3),
    )


def test_codes_are_taken_early_where_that_changes_no_bit(rng: np.random.Generator) -> None:
    images = rng.normal(size=(8, 12, 12, 3)).astype(np.float32)
    for limits, names in (
        ((1.0, 1.0), "images stem a pool depthwise c last shortcut sum mean d head"),
        ((1.0, 1.1), "images stem relu pool a b depthwise c last shortcut sum mean d head"),
    ):
        graph = block(rng, limits)
        early = quantize_early(graph)
        assert [node.name for node in early.nodes] == names.split()
        expected = run(graph, images)
        assert np.ptp(expected, axis=0).min() > 0
        np.testing.assert_array_equal(run(early, images), expected)


@pytest.mark.parametrize(("int4", "integer_biases"), [(False, True), (True, True), (True, False)])
def test_low_bits_are_clipped_as_integers(
    rng: np.random.Generator, int4: bool, integer_biases: bool, tmp_path: Path
) -> None:
    graph = block(rng)
    file = to_onnx(graph, int4=int4, integer_biases=integer_biases)
    assert file.opset_import[0].version == (21 if int4 else 13)
    arrays = arrays_of(file)
    assert check_integers(graph, arrays) == 5
    stored = {array.name for array in file.graph.initializer if array.data_type == 22}
    names = ("stem", "depthwise", "shortcut", "last")
    assert stored == ({f"{name}/kernel_int4" for name in names} if int4 else set())
    assert any(array.dtype == np.int32 for array in arrays.values()) == integer_biases
    images = 3 * rng.normal(size=(8, 12, 12, 3)).astype(np.float32)
    expected = run(with_whole_biases(graph, arrays), images)
    (found,) = session(file).run(None, {"images": images})
    apart = np.max(np.abs(found - expected), axis=1) / np.ptp(expected)
    assert np.mean(apart < 1e-5) > 0.6
    assert fused(file, tmp_path) == (
        {"QLinearConv": 2, "MatMulIntegerToFloat": 3}
        if integer_biases
        else {"MatMulIntegerToFloat": 3, "Conv": 2}
    )


def test_what_has_no_integer_kernel_keeps_its_numbers(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """A channel whose scale is 0, so that no integer is its bias, and scales by group."""
    graph = block(rng)
    nodes = list(graph.nodes)
    stem = nodes[1].operation
    scale = stem.kernel.scale.at[..., 3].set(0.0)
    stem = dataclasses.replace(stem, kernel=dataclasses.replace(stem.kernel, scale=scale))
    nodes[1] = dataclasses.replace(nodes[1], operation=stem)
    last = dataclasses.replace(nodes[9].operation, kernel=quantized(rng, 1, 1, 8, 12, group=2))
    nodes[9] = dataclasses.replace(nodes[9], operation=last)
    graph = dataclasses.replace(graph, nodes=tuple(nodes))
    file = to_onnx(graph, integer_biases=True)
    images = rng.normal(size=(8, 12, 12, 3)).astype(np.float32)
    expected = run(with_whole_biases(graph, arrays_of(file)), images)
    (found,) = session(file).run(None, {"images": images})
    apart = np.max(np.abs(found - expected), axis=1) / np.ptp(expected)
    assert np.mean(apart < 1e-5) > 0.6
    assert fused(file, tmp_path) == {
        "QLinearConv": 1,
        "MatMulIntegerToFloat": 2,
        "Conv": 2,
    }


def test_a_file_normalizes_images_and_says_what_it_is(rng: np.random.Generator) -> None:
    graph, mean, std = block(rng), [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
    names = ["ant", "bee", "cat", "dog"]
    told = {"experiment": "it", "step": 7}
    file = to_onnx(graph, mean=mean, std=std, class_names=names, description=told)
    images = rng.integers(0, 256, (8, 12, 12, 3)).astype(np.uint8)
    normalized = np.asarray(normalize(jnp.asarray(images), mean, std))
    (expected,) = session(to_onnx(graph)).run(None, {"images": normalized})
    running = session(file)
    np.testing.assert_array_equal(running.run(None, {"images": images})[0], expected)
    known = running.get_modelmeta().custom_metadata_map
    assert {name: json.loads(text) for name, text in known.items()} == {
        "class_names": names,
        "mean": mean,
        "std": std,
        "network": told,
    }
    again = to_onnx(graph, mean=mean, std=std, class_names=names, description=told)
    assert len({one.SerializeToString(deterministic=True) for one in (file, again)}) == 1
    for wrong, message in (
        ({"mean": mean}, "both mean and std, or neither"),
        ({"mean": mean, "std": [1.0]}, "Images of 3 channels want as many means"),
        ({"mean": mean, "std": [1.0, 0.0, 1.0]}, "positive deviations"),
        ({"class_names": names[:3]}, "3 class names for 4 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            to_onnx(graph, **wrong)
