"""Integer layers against sums in int64, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.activations import ActivationQuantizer
from ab_jax.export.graph.operations import Convolution, Dense, Graph, Node, Quantize, Sign
from ab_jax.export.integers import evaluate_in_integers, layers_in_float
from ab_jax.quantizers import Quantized
from tests.fast_compilation import compiled

UNIT = 2.0**-6  # scales that are powers of two make all float32 arithmetic exact


def graph_of(layer: Convolution | Dense, quantize: Quantize | Sign, shape: tuple) -> Graph:
    nodes = (Node("input", quantize, (0,), shape), Node("layer", layer, (1,), ()))
    return Graph(nodes, shape)


def kernel_of(rng: np.random.Generator, shape: tuple[int, ...], affine: bool) -> Quantized:
    channels = (1,) * (len(shape) - 1) + (shape[-1],)
    return Quantized(
        codes=jnp.asarray(rng.integers(-127, 128, shape), jnp.int8),
        scale=jnp.asarray(2.0 ** rng.integers(-8, 3, channels), jnp.float32),
        zero_point=jnp.asarray(rng.integers(-128, 128, channels), jnp.int8) if affine else None,
        bits=8,
        dtype="float32",
    )


def exact(kernel: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """Codes less their zero points, int64, and the scales of the channels."""
    zero_point = 0 if kernel.zero_point is None else np.asarray(kernel.zero_point, np.int64)
    return np.asarray(kernel.codes, np.int64) - zero_point, np.asarray(kernel.scale).ravel()


INPUTS = {
    "unsigned 8": (Quantize(ActivationQuantizer(bits=8, signed=False), 255 * UNIT), 0, 255),
    "unsigned 4": (Quantize(ActivationQuantizer(bits=4, signed=False), 15 * UNIT), 0, 15),
    "signed 8": (Quantize(ActivationQuantizer(bits=8, signed=True), 127 * UNIT), -127, 127),
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_a_convolution_sums_integers(
    rng: np.random.Generator, name: str, affine: bool, groups: int
) -> None:
    quantize, low, high = INPUTS[name]
    height, width = (int(side) for side in rng.integers(5, 10, 2))
    window, stride = (int(rng.choice([1, 3])), int(rng.choice([1, 3]))), (1, 2)
    pads = ((1, 0), (2, 1))
    kernel = kernel_of(rng, (*window, 4 // groups, 8), affine)
    bias = jnp.asarray(rng.integers(-50, 50, 8), jnp.float32)
    codes = rng.integers(low, high + 1, (3, height, width, 4))
    layer = Convolution(kernel, bias, stride, pads, groups)
    graph = graph_of(layer, quantize, (height, width, 4))
    assert layers_in_float(graph) == []
    found = compiled(
        lambda x: evaluate_in_integers(graph, x, for_cpu=True), jnp.float32(codes * UNIT)
    )

    weights, scales = exact(kernel)
    padded = np.pad(codes, ((0, 0), *pads, (0, 0)))
    rows, columns = ((padded.shape[i + 1] - window[i]) // stride[i] + 1 for i in range(2))
    sums = np.zeros((3, rows, columns, 8), np.int64)
    for i in range(window[0]):
        for j in range(window[1]):
            tap = padded[:, i:, j:][:, :: stride[0], :: stride[1]][:, :rows, :columns]
            if groups == 1:
                sums += tap @ weights[i, j]
            else:  # two kernels a channel
                sums += np.repeat(tap, 2, axis=-1) * weights[i, j, 0]
    np.testing.assert_array_equal(found, sums * UNIT * scales + np.asarray(bias))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", [*INPUTS, "sign"])
def test_a_dense_layer_sums_integers(rng: np.random.Generator, name: str, affine: bool) -> None:
    kernel = kernel_of(rng, (300, 7), affine)
    weights, scales = exact(kernel)
    if name == "sign":
        x = rng.choice([-3.0, -0.5, 0.0, 0.25], (5, 300))
        quantize, values = Sign(), np.where(x >= 0, 1.0, -1.0)
    else:
        quantize, low, high = INPUTS[name]
        values = x = rng.integers(low, high + 1, (5, 300)) * UNIT
    graph = graph_of(Dense(kernel, None), quantize, (300,))
    found = compiled(lambda x: evaluate_in_integers(graph, x), jnp.float32(x))
    np.testing.assert_array_equal(found, (values @ weights) * scales)


def test_on_accelerators_a_convolution_is_one_of_int8(rng: np.random.Generator) -> None:
    kernel = kernel_of(rng, (3, 3, 4, 8), affine=False)
    layer = Convolution(kernel, None, (1, 1), ((1, 1), (1, 1)))
    graph = graph_of(layer, INPUTS["signed 8"][0], (6, 6, 4))
    images = jax.ShapeDtypeStruct((2, 6, 6, 4), jnp.float32)
    lowered = jax.jit(lambda x: evaluate_in_integers(graph, x, for_cpu=False)).lower(images)
    (line,) = [line for line in lowered.as_text().splitlines() if "convolution" in line]
    assert "(tensor<2x8x8x4xi8>, tensor<3x3x4x8xi8>) -> tensor<2x6x6x8xi32>" in line


def test_scales_within_a_sum_leave_a_layer_in_float(rng: np.random.Generator) -> None:
    kernel = kernel_of(rng, (6, 8), affine=False)
    by_input = Quantized(kernel.codes, jnp.ones((6, 1), jnp.float32), None, 8, "float32")
    graph = graph_of(Dense(by_input, None), INPUTS["signed 8"][0], (6,))
    assert layers_in_float(graph) == ["layer"]
    codes = rng.integers(-127, 128, (2, 6))
    found = evaluate_in_integers(graph, jnp.float32(codes * UNIT))
    np.testing.assert_array_equal(found, codes @ np.asarray(kernel.codes, np.int64) * UNIT)
