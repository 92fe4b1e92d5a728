"""Networks as LiteRT files: our integers inside, and our numbers from the interpreter."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from jax import lax

from ab_jax.activations import ActivationQuantizer
from ab_jax.export.inference import inference
from ab_jax.export.litert import METADATA, function_to_litert
from ab_jax.export.traced import (
    Codes,
    TracedFunction,
    WeightedProduct,
    endings,
    trace,
    weighted_product,
)
from ab_jax.export.traced.computing import evaluate
from ab_jax.export.traced.quantized_operands import quantize_p
from ab_jax.quantizers import Quantized
from tests.export.exported_networks import off_borders
from tests.export.litert_answers import File, answers_by_name
from tests.export.small_networks import CASES, make
from tests.fast_compilation import compiled

#: Of each network the layers that are integer operators if their codes fit into int8. In float are
#: those whose output no `quantize` takes alone, and those whose input is none.
IN_INTEGERS = {
    "binarynet": r"conv[024]|dense[01]",
    "binarynet, sign": r"none",
    "mobilenet": r"(?!block12/pointwise|head).*",
    "resnet v1": r".*/conv[01]",
    "resnet v1, keras": r".*/conv[01]",
    "resnet v2": r".*/conv[01]",
    "resnet v2, keras": r".*/conv[01]",
    "resnet, basic": r".*/conv0",
}
BATCH = 8
UNSIGNED = ActivationQuantizer(bits=8, signed=False)
#: Codes as layers and `quantize` give them; what moves them has other names.
GIVEN = re.compile(r"codes/\d+(/(conv_2d|depthwise_conv_2d|fully_connected))?")


def products_of(traced: TracedFunction) -> list[WeightedProduct]:
    found = map(weighted_product, traced.graph.operations)
    return [product for product in found if product is not None]


def by_channel(array: np.ndarray) -> np.ndarray:
    """Of channels that are last, of which each has one number."""
    rows = array.reshape(-1, array.shape[-1])
    assert (rows == rows[:1]).all()
    return rows[0]


def check_integers(traced: TracedFunction, file: File) -> tuple[set[str], set[str]]:
    """Compare codes, scales, zero points and biases with the simplified graph's.

    Returns the layers in integers, and those that could be, by their codes.
    """
    whole, fitting = set(), set()
    known = endings(traced.graph)
    for product in products_of(traced):
        weight = product.weight
        assert isinstance(weight, Codes)
        name = weight.path
        codes, found = weight.codes.astype(int), file.constant(f"{name}/codes")
        ending = known.get(product.operation)
        bias = np.zeros(1) if ending is None or ending.bias is None else ending.bias.reshape(-1)
        if found.ndim == 4 and found.shape[0] == 1 and codes.shape[2] == 1:
            found = found[0, :, :, None]
        else:
            found = np.moveaxis(found, 0, -1)
        quantization = file.tensors[f"{name}/codes"].quantization
        scale, zeros = np.asarray(quantization.scale), np.asarray(quantization.zeroPoint)
        assert file.tensors[f"{name}/codes"].shape[quantization.quantizedDimension] in (
            codes.shape[-1],
            1,
        )
        ours = by_channel(weight.scales[0])
        of_codes = 0 if weight.zero_point is None else by_channel(weight.zero_point).astype(int)
        if np.abs(codes - of_codes).max() <= 127:
            fitting.add(name.removesuffix("/kernel"))
        if file.tensors[f"{name}/bias"].type == schema.TensorType.INT32:
            whole.add(name.removesuffix("/kernel"))
            times = ours / scale
            assert set(np.log2(times)) <= set(range(8)), "powers of two"
            codes = (codes - of_codes) * times.astype(int)
            assert not zeros.any()
            unit = file.scale(f"{name}/bias").astype(np.float64)
            apart = file.constant(f"{name}/bias") * unit - bias
            assert (np.abs(apart) <= 0.5001 * unit + 1e-6 * np.abs(bias)).all()
        else:
            np.testing.assert_array_equal(np.broadcast_to(scale, ours.shape), ours)
            np.testing.assert_array_equal(zeros, np.broadcast_to(of_codes, zeros.shape))
            np.testing.assert_array_equal(
                np.broadcast_to(file.constant(f"{name}/bias"), ours.shape),
                np.broadcast_to(bias.astype(np.float32), ours.shape),
            )
        np.testing.assert_array_equal(found, codes)
    return whole, fitting


def tolerances(file: File) -> dict[str, Any]:
    """By how many codes a rounding may miss, for each `quantize`: nothing but borders may tip.

    A standalone one divides in float32. An integer layer has its bias rounded to a unit of its
    sums, off by half of one, and the plain kernels round a sum twice, the first time to no more
    than a unit.
    """
    allowed: dict[str, Any] = {}
    for code, (*inputs, output) in file.operators():
        name = numbered(output)
        if code == "QUANTIZE":
            allowed[name] = 1e-3
        elif file.tensors[output].type == schema.TensorType.INT8 and len(inputs) == 3:
            x, kernel, _ = inputs
            unit = file.scale(x) * file.scale(kernel) / file.scale(output)
            allowed[name] = 1.5 * unit + 1e-3
    return allowed


def numbered(name: str) -> str:
    """The name of codes without the operator that gives them."""
    return "/".join(name.split("/")[:2])


def forced(traced: TracedFunction, images: Any, codes: dict[str, Any]) -> tuple[Any, Any]:
    """Logits where each `quantize` gives these codes, and what it was to round, in codes."""
    unrounded: dict[str, Any] = {}
    names = {operation: f"codes/{i}" for i, operation in enumerate(quantizes_of(traced))}

    def done(operation: Any, operands: Any, by_jax: Any) -> Any:
        if operation not in names:
            return None
        x, limit = operands
        quantizer, name = operation.params["quantizer"], names[operation]
        scale = quantizer.scale(limit)
        unrounded[name] = jnp.clip(x / scale, *quantizer.levels)
        return codes[name] * scale

    return evaluate(traced, images, done=done), unrounded


def quantizes_of(traced: TracedFunction) -> list[Any]:
    return [o for o in traced.graph.operations if o.primitive == "quantize"]


@pytest.mark.parametrize("name", CASES)
def test_litert_computes_what_the_network_does(rng: np.random.Generator, name: str) -> None:
    model, variables, shape = make(name, rng)
    net = inference(model, variables)
    images = rng.normal(size=(BATCH, *shape)).astype(np.float32)
    inputs: dict[str, Any] = {"rules": net.rules, "ranges": net.ranges}
    data = function_to_litert(
        *(net.function, net.params, images[:3]),
        **inputs,
        input_names=["images"],
        output_names=["logits"],
    )
    traced = trace(net.function, net.params, images[:3], **inputs).simplified()
    file = File(data)
    whole, fitting = check_integers(traced, file)
    assert whole == {layer for layer in fitting if re.fullmatch(IN_INTEGERS[name], layer)}

    outputs = answers_by_name(data, {"images": images})
    codes = {numbered(n): x for n, x in outputs.items() if GIVEN.fullmatch(n)}
    assert sorted(codes) == sorted(f"codes/{i}" for i in range(len(quantizes_of(traced))))
    (expected, unrounded), free = compiled(
        lambda x, c: (forced(traced, x, c), evaluate(traced, x)),
        images,
        {name: jnp.asarray(x, jnp.float32) for name, x in codes.items()},
    )
    # Every code is the nearest one, or on the border.
    allowed = tolerances(file)
    for quantize, found in codes.items():
        assert (np.abs(found - unrounded[quantize]) <= 0.5 + allowed[quantize]).all(), quantize
    largest = np.abs(expected).max()
    np.testing.assert_allclose(outputs["plain/logits"], expected, rtol=0, atol=1e-5 * largest)
    # Elsewhere a code that tips moves the logits a little; without codes there is none to tip.
    bound = 0.25 if codes else 1e-5
    one = answers_by_name(data, {"images": images[:1]})
    for kernels in ("plain", "fast"):
        logits = outputs[f"{kernels}/logits"]
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, free, rtol=0, atol=bound * largest)
        np.testing.assert_allclose(
            one[f"{kernels}/logits"], logits[:1], rtol=0, atol=1e-5 * largest
        )


# One layer, whose codes are the logits


def quantized(
    rng: np.random.Generator, shape: Sequence[int], bits: int = 8, affine: bool = False
) -> Quantized:
    most = 2 ** (bits - 1) - 1
    scales = (1,) * (len(shape) - 1) + (shape[-1],)
    fan_in = np.prod(shape[:-1])
    return Quantized(
        codes=jnp.asarray(rng.integers(-most - affine, most + 1, shape), jnp.int8),
        scale=jnp.asarray(rng.uniform(1, 2, scales) / (most * np.sqrt(fan_in)), jnp.float32),
        zero_point=jnp.asarray(rng.integers(-3, 4, scales), jnp.int8) if affine else None,
        bits=bits,
        dtype="float32",
    )


def convolution(padding: Any, strides: Sequence[int] = (1, 1), groups: int = 1) -> Any:
    return lambda x, kernel: lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


SAME = ((1, 1), (1, 1))
BIAS = np.linspace(-0.5, 4, 6, dtype=np.float32)
#: No gamma, one so small that its bias has no unit in int32, and one that cannot be folded so.
GAMMA = np.array([1, 0, 1e-20, -1, 1e-3, 2], np.float32)
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "convolution": ((3, 3, 4, 6), (7, 5, 4), convolution(SAME)),
    "padded": ((3, 3, 4, 6), (8, 6, 4), convolution(SAME, (2, 2))),
    "grouped": ((3, 3, 2, 6), (5, 5, 4), convolution("VALID", groups=2)),
    "depthwise": ((3, 3, 1, 6), (5, 5, 3), convolution(SAME, groups=3)),
    "dense": ((12, 6), (12,), lambda x, kernel: x @ kernel),
}


def one_layer(product: Any) -> Any:
    """From images in signed codes to codes of what the layer gives, with a norm, clipped at 6."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        signed = ActivationQuantizer(bits=8, signed=True)
        x = quantize_p.bind(x, jnp.float32(2.5), quantizer=signed)
        y = product(x, params["layer"]["kernel"])
        bias, gamma = (a.reshape((1,) * (y.ndim - 1) + (6,)) for a in (BIAS, GAMMA))
        y = jnp.clip((y + bias) * gamma + bias, 0, 6)
        return quantize_p.bind(y, jnp.float32(7.0), quantizer=UNSIGNED)

    return f


@pytest.mark.parametrize("kind", KINDS)
def test_integer_layers_round_to_the_nearest_code(rng: np.random.Generator, kind: str) -> None:
    weights, shape, product = KINDS[kind]
    kernel = quantized(rng, weights)
    images = off_borders(rng.normal(size=(BATCH, *shape)), 2.5 / 127)
    images.reshape(-1)[:2] = -3, 3  # beyond the limit
    data = function_to_litert(
        one_layer(product), {"layer": {"kernel": kernel}}, images[:1], output_names=["output"]
    )
    file = File(data)
    assert file.tensors["layer/kernel/bias"].type == schema.TensorType.INT32
    assert [code for code, _ in file.operators()].count("PAD") == (kind == "padded")

    outputs = answers_by_name(data, {"input0": images})
    codes = np.clip(np.rint(images.astype(np.float64) * 127 / 2.5), -127, 127)
    np.testing.assert_array_equal(outputs["codes/0"], codes)
    folded = np.asarray(kernel.dequantize()) * GAMMA
    sums = np.asarray(compiled(product, jnp.asarray(codes * 2.5 / 127, "f"), folded))
    biases = BIAS.astype(np.float64) * GAMMA + BIAS
    wanted = np.clip(sums.astype(np.float64) + biases, 0, 6) * 255 / 7
    (output,) = [name for name in file.tensors if re.fullmatch(r"codes/1/.*(conv_2d|cted)", name)]
    unit = file.scale("codes/0") * file.scale("layer/kernel/codes") / file.scale(output)
    for kernels, of_unit in (("plain", 1.5), ("fast", 0.5)):
        found = outputs[f"{kernels}/output"] * 255 / 7
        assert (np.abs(found - np.rint(found)) < 1e-3).all()
        assert (np.abs(found - wanted) <= 0.5 + of_unit * unit + 1e-3).all()
    assert found.max() == pytest.approx(np.rint(6 * 255 / 7), abs=1e-3)


def test_narrow_codes_are_stored_in_their_width(rng: np.random.Generator) -> None:
    """Of float operators, which a layer without codes before it is; the numbers are the same."""
    images = rng.normal(size=(BATCH, 12)).astype(np.float32)
    f = lambda p, x: x @ p["head"]
    for bits, kind in ((2, schema.TensorType.INT2), (3, schema.TensorType.INT4)):
        kernel = quantized(rng, (12, 5), bits, affine=True)
        data = function_to_litert(f, {"head": kernel}, images)
        assert File(data).tensors["head/codes"].type == schema.TensorType.INT8
        data = function_to_litert(f, {"head": kernel}, images, narrowest=2)
        assert File(data).tensors["head/codes"].type == kind
        np.testing.assert_array_equal(File(data).constant("head/codes").T, kernel.codes)
        outputs = answers_by_name(data, {"input0": images})
        expected = images.astype(np.float64) @ np.asarray(kernel.dequantize(), np.float64)
        for kernels in ("plain", "fast"):
            np.testing.assert_allclose(outputs[f"{kernels}/output"], expected, atol=1e-5)


def test_what_has_no_codes_is_written_in_float(rng: np.random.Generator) -> None:
    """Weights as they are, an end of clipping that LiteRT does not know, and odd padding."""

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    def f(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.clip(convolution(SAME)(x, params["conv"]), 0, 0.7)
        x = x * params["scale"] + params["shift"]
        x = lax.reduce_window(
            *(x, -jnp.inf, lax.max, (1, 3, 1, 1), (1, 2, 1, 1)),
            ((0, 0), (2, 1), (0, 0), (0, 0)),
        )
        return x.reshape(x.shape[0], -1) @ params["dense"] + params["bias"]

    params = {"conv": normal(3, 3, 2, 3), "dense": normal(84, 4), "bias": normal(1, 4)}
    params |= {"scale": normal(1, 1, 1, 3), "shift": normal(1, 1, 1, 3)}
    images = normal(BATCH, 6, 7, 2)
    outputs = answers_by_name(function_to_litert(f, params, images), {"input0": images})
    expected = compiled(f, params, images)
    for kernels in ("plain", "fast"):
        np.testing.assert_allclose(outputs[f"{kernels}/output"], expected, rtol=0, atol=1e-4)


def test_what_is_known_of_a_network_travels_with_it(rng: np.random.Generator) -> None:
    about = {"data": {"class_names": ["Käse", "dog"], "mean": [0.5]}}
    images = rng.normal(size=(2, 3)).astype(np.float32)
    network = (lambda p, x: x @ p["head"], {"head": quantized(rng, (3, 2))}, images)
    entries = File(function_to_litert(*network, description=about)).metadata()
    assert entries.pop(METADATA) == about
    assert METADATA not in File(function_to_litert(*network)).metadata()
    assert entries.pop("quantization") == {"weights": {"head": 8}, "inputs": {}}
    assert entries.pop("source").keys() == {"ab_jax", "jax"}
    assert not entries


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="narrowest=3: codes are stored at 2, 4 or 8 bits"):
        function_to_litert(lambda _, x: x, {}, np.ones(3, np.float32), narrowest=3)


def test_constants_lie_at_multiples_of_16_bytes(rng: np.random.Generator) -> None:
    images = rng.normal(size=(2, 5)).astype(np.float32)
    params = {"layer": {"kernel": quantized(rng, (5, 6))}}
    data = function_to_litert(one_layer(lambda x, kernel: x @ kernel), params, images)
    for name in ("layer/kernel/codes", "layer/kernel/bias"):
        found = File(data).constant(name)
        assert data.find(found.tobytes()) % 16 == 0
