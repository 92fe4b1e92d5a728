"""Our networks as ONNX files: our integers inside, our logits, in ONNX Runtime's fast kernels."""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from onnx import numpy_helper

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.inference import inference
from ab_jax.export.onnx import function_to_onnx
from ab_jax.export.traced import Codes, Constant, TracedFunction, trace, weighted_product
from ab_jax.export.traced.computing import evaluate
from ab_jax.products import ActivationRules
from ab_jax.quantizers import Quantized
from tests.export.exported_networks import coded, drawn
from tests.export.small_networks import NETWORKS, make
from tests.export.test_folding import convolved, pooled, pooled_params, pooled_rules
from tests.fast_compilation import compiled

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


def codes_in_file(arrays: dict[str, np.ndarray], weight: Codes) -> np.ndarray:
    """The codes of a weight in the order of the file, whatever their width there."""
    path = weight.path
    if f"{path}/packed" not in arrays:
        stored = arrays.get(f"{path}/codes", arrays.get(f"{path}/codes_int4"))
        assert stored is not None
        return stored.astype(np.int8)
    packed = arrays[f"{path}/packed"].astype(int)
    base, lowest, step = {1: (2, -1, 2)}.get(
        weight.bits, (3, -1, 1) if weight.codes.min() >= -1 else (4, -2, 1)
    )
    count = {2: 8, 3: 5, 4: 4}[base]
    digits = packed[:, None] // base ** np.arange(count) % base
    return (digits.reshape(-1)[: weight.codes.size] * step + lowest).astype(np.int8)


def check_integers(net: TracedFunction, arrays: dict[str, np.ndarray]) -> int:
    """Compare each code, and how scales relate, of the simplified graph with those in a file."""
    compared = 0
    for operation in net.graph.operations:
        product = weighted_product(operation)
        if product is None or not isinstance(product.weight, Codes):
            continue
        weight = product.weight
        found = codes_in_file(arrays, weight).reshape(-1)
        orders = [(0, 1), (1, 0)] if weight.codes.ndim == 2 else [(0, 1, 2, 3), (3, 2, 0, 1)]
        same = [
            np.array_equal(found, weight.codes.transpose(order).reshape(-1)) for order in orders
        ]
        assert any(same), weight.path
        # Of layers in float the scale of the input is a part of these.
        scale = arrays[f"{weight.path}/scale"].reshape(-1).astype(np.float64)
        channels = np.moveaxis(weight.scales[0], next(iter(product.channels.values())), 0)
        ours = channels.reshape(len(channels), -1)[:, 0].astype(np.float64)
        if scale.size == 1:
            assert np.ptp(ours) == 0
        else:
            ratio = scale / np.where(ours == 0, 1, ours)
            ratio = ratio[ours != 0]
            whole = f"{weight.path}/bias" in arrays  # the codes are multiplied by powers of 2 there
            powers = np.log2(ratio / ratio[0])
            np.testing.assert_allclose(powers, np.rint(powers) if whole else 0, rtol=0, atol=1e-6)
        compared += 1
    return compared


def with_whole_biases(net: TracedFunction, arrays: dict[str, np.ndarray]) -> TracedFunction:
    """The graph with biases as the file's integers have them, which are the nearest to its own."""
    written = {}
    for operation in net.graph.operations:
        bias = operation.inputs[-1] if operation.inputs else None
        if operation.primitive != "add" or not isinstance(bias, Constant):
            continue
        whole = arrays.get(f"{bias.path}/bias")
        if whole is None or whole.dtype != np.int32:
            continue
        unit = arrays[f"{bias.path}/bias_scale"].astype(np.float64)
        own = np.asarray(bias.array, np.float64).reshape(-1)
        assert (np.abs(whole * unit - own) <= 0.5001 * unit).all()
        rounded = Constant((whole * unit).astype(np.float32).reshape(bias.shape))
        inputs = (operation.inputs[0], rounded)
        written[operation] = [dataclasses.replace(operation, inputs=inputs)]
    return dataclasses.replace(net, graph=net.graph.rewritten(written))


def check_answers(found: np.ndarray, wanted: np.ndarray, step: float) -> None:
    """But for codes on the border of two, of which one is worth `step` of the answers' range."""
    # Sums in another order: a float in its last bits, and so, seldom, a code in its next step.
    apart = np.abs(found - wanted).reshape(len(wanted), -1).max(axis=1) / np.ptp(wanted)
    assert np.mean(apart < 1e-5) > 0.6
    assert np.max(apart) < step


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
    net = inference(model, variables)
    options: dict[str, Any] = {"rules": net.rules, "ranges": net.ranges}
    images = rng.normal(size=(24, *shape)).astype(np.float32)
    file = function_to_onnx(
        net.function,
        net.params,
        images,
        **options,
        input_names=["images"],
        integer_biases=integer_biases,
    )
    onnx.checker.check_model(file, full_check=True)
    arrays = arrays_of(file)
    graph = trace(net.function, net.params, images, **options).simplified()
    layers = [p for p in map(weighted_product, graph.graph.operations) if p is not None]
    assert check_integers(graph, arrays) == len(layers)
    rounded = with_whole_biases(graph, arrays)
    assert (rounded.graph.operations != graph.graph.operations) == integer_biases
    if integer_biases:
        wanted = compiled(lambda x: evaluate(rounded, x), images)
    else:
        values = ab.dequantize(variables)
        wanted = compiled(lambda x: model.apply(values, x, train=False), images)
    running = session(file)
    (found,) = running.run(None, {"images": images})
    assert found.dtype == np.float32
    check_answers(found, np.asarray(wanted), 1 / 15)
    expected_kernels = FUSED_WITH_INTEGER_BIASES if integer_biases else FUSED
    assert fused(file, tmp_path) == expected_kernels[name]
    for count in (1, 5):
        (few,) = running.run(None, {"images": images[:count]})
        np.testing.assert_allclose(few, found[:count], rtol=0, atol=1e-5 * np.ptp(found))


# Layers by hand


def by_hand(params: Any, x: Any) -> Any:
    """`pooled` and a head."""
    return pooled(params, x).mean((1, 2)) @ params["head"]


def params_by_hand(rng: np.random.Generator) -> Any:
    params = pooled_params(rng)
    bias = params.pop("bias")
    head = coded({"head": drawn(rng, 12, 4)}, 8)
    return {**coded(params, 4), **head, "bias": bias}


def rules_by_hand() -> ActivationRules:
    head = ("head", ActivationQuantizer(bits=8, signed=True, limit=1.0))
    return ActivationRules([head, *pooled_rules((1.0, 1.0)).rules])


@pytest.mark.parametrize("integer_biases", [False, True])
def test_low_bits_are_clipped_as_integers(
    rng: np.random.Generator, integer_biases: bool, tmp_path: Path
) -> None:
    params, images = params_by_hand(rng), 3 * drawn(rng, 8, 12, 12, 3)
    options: dict[str, Any] = {"rules": rules_by_hand(), "ranges": {}}
    file = function_to_onnx(
        by_hand, params, images, **options, integer_biases=integer_biases, input_names=["images"]
    )
    arrays = arrays_of(file)
    graph = trace(by_hand, params, images, **options).simplified()
    assert check_integers(graph, arrays) == 5
    stored = {a.name for a in file.graph.initializer if a.data_type == onnx.TensorProto.INT4}
    assert stored == {f"{name}/codes_int4" for name in ("stem", "depthwise", "shortcut", "last")}
    wanted = compiled(lambda x: evaluate(with_whole_biases(graph, arrays), x), images)
    if integer_biases:  # codes of 4 bits, up to 7, have room for a factor of 16
        unit = np.asarray(params["stem"].scale).reshape(-1) * (2.0 / 7) / 16
        np.testing.assert_allclose(arrays["stem/bias_scale"], unit, rtol=1e-6)
    (found,) = session(file).run(None, {"images": images})
    check_answers(found, np.asarray(wanted), 1 / 3)
    assert fused(file, tmp_path) == (
        {"QLinearConv": 2, "MatMulIntegerToFloat": 3}
        if integer_biases
        else {"MatMulIntegerToFloat": 3, "Conv": 2}
    )


def test_what_has_no_integer_kernel_keeps_its_numbers(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """A channel whose scale is 0, so that no integer is its bias, and scales by group."""
    params = params_by_hand(rng)
    stem, last = params["stem"], params["last"]
    scale = np.array(stem.scale)
    scale[..., 3] = 0
    groups = rng.uniform(0.05, 0.1, (1, 1, 4, 12)).astype(np.float32)
    params = {
        **params,
        "stem": dataclasses.replace(stem, scale=scale),
        "last": Quantized(last.codes, groups, None, 4, "float32"),
    }
    images = 3 * drawn(rng, 8, 12, 12, 3)
    options: dict[str, Any] = {"rules": rules_by_hand(), "ranges": {}}
    file = function_to_onnx(
        by_hand, params, images, **options, integer_biases=True, input_names=["images"]
    )
    graph = trace(by_hand, params, images, **options)
    wanted = compiled(lambda x: evaluate(graph, x), images)
    (found,) = session(file).run(None, {"images": images})
    check_answers(found, np.asarray(wanted), 1 / 3)
    assert fused(file, tmp_path) == {"QLinearConv": 1, "MatMulIntegerToFloat": 2, "Conv": 2}


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (2, 3), (5, 5)])
@pytest.mark.parametrize("ends", ["floats", "codes"])
def test_one_convolution_of_codes(
    window: tuple[int, int], layout: str, ends: str, rng: np.random.Generator
) -> None:
    """Strided, dilated and padded, in every form that there is, against float64."""
    kernel = coded({"w": drawn(rng, *window, 8, 6)}, 8)["w"]
    bias, back = drawn(rng, 6), drawn(rng, 6, 3)
    place = (slice(None), None, None) if layout == "NCHW" else (None, None)

    def f(params: Any, x: Any) -> Any:
        y = lax.conv_general_dilated(
            x,
            params["w"],
            (2, 1),
            ((1, 0), (2, 1)),
            rhs_dilation=(1, 2),
            dimension_numbers=(layout, "HWIO", layout),
        )
        y = jnp.maximum(y + bias[place][None], 0)
        y = y if layout == "NHWC" else y.transpose(0, 2, 3, 1)
        return y if ends == "floats" else y @ params["back"]

    x = drawn(rng, 4, 9, 11, 8)
    x = x if layout == "NHWC" else x.transpose(0, 3, 1, 2)
    quantizers = {"w": ActivationQuantizer(bits=8, limit=3.0, signed=True)}
    params = {"w": kernel, "back": back}
    if ends == "codes":
        quantizers["back"] = ActivationQuantizer(bits=8, limit=16.0, signed=False)
    rules = ActivationRules([*quantizers.items(), (".*", None)])
    for integer_biases in (False, True):
        file = function_to_onnx(
            f, params, x, rules=rules, ranges={}, input_names=["x"], integer_biases=integer_biases
        )
        (found,) = session(file).run(None, {"x": x})
        unit = np.float32(3.0) * np.float32(1 / 127)
        codes = np.clip(np.rint(x / unit), -127, 127).astype(np.int64)
        codes = codes if layout == "NHWC" else codes.transpose(0, 2, 3, 1)
        padded = np.pad(codes, ((0, 0), (1, 0), (2, 1), (0, 0)))
        rows = (padded.shape[1] - window[0]) // 2 + 1
        columns = padded.shape[2] - 2 * (window[1] - 1)
        sums = np.zeros((len(x), rows, columns, 6), np.int64)
        for i, j in np.ndindex(*window):
            part = padded[:, i : i + 2 * rows - 1 : 2, 2 * j : 2 * j + columns]
            sums += part @ np.asarray(kernel.codes, np.int64)[i, j]
        scale = np.asarray(kernel.scale, np.float64).reshape(-1) * np.float64(unit)
        wanted = np.maximum(sums * scale + bias, 0)
        if ends == "codes":
            step = 16 / 255
            wanted = np.clip(np.rint(wanted / step), 0, 255) * step @ back
            # A code on the border of two may be either, and seldom two at one place are.
            close = np.abs(found - wanted) <= 2.01 * step * np.abs(back).max(axis=0)
            assert close.all()
            assert np.mean(np.abs(found - wanted) < 1e-4) > 0.9
        else:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * wanted.max())


def test_a_bias_of_one_number_serves_every_channel(rng: np.random.Generator) -> None:
    """Behind a convolution, in floats and in integers."""
    params = {"w": coded({"w": drawn(rng, 3, 3, 8, 4)}, 8)["w"], "back": drawn(rng, 4, 2)}
    f = lambda p, x: jnp.maximum(convolved(x, p["w"]) + np.float32(0.7), 0) @ p["back"]
    x = drawn(rng, 2, 5, 5, 8)
    codes = ActivationQuantizer(bits=8, limit=3.0, signed=True)
    for rules in (None, ActivationRules([("w", codes), ("back", codes)])):
        ranges = None if rules is None else {}
        graph = trace(f, params, x, rules=rules, ranges=ranges)
        wanted = np.asarray(compiled(lambda x, of=graph: evaluate(of, x), x))
        for integer_biases in (False, True):
            file = function_to_onnx(
                f, params, x, rules=rules, ranges=ranges, integer_biases=integer_biases
            )
            (found,) = session(file).run(None, {"input0": x})
            np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05 * np.ptp(wanted))


def test_a_name_for_each_class(rng: np.random.Generator) -> None:
    f = lambda p, x: x @ p["w"]
    params, x = {"w": drawn(rng, 4, 3)}, drawn(rng, 2, 4)
    with pytest.raises(ValueError, match=r"2 class names for 3 classes"):
        function_to_onnx(f, params, x, class_names=["a", "b"])
    assert re.search("class_names", str(function_to_onnx(f, params, x, class_names=list("abc"))))
