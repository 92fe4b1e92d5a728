"""Integer layers against sums in int64, bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, sign
from ab_jax.export.inference import inference
from ab_jax.export.integers import evaluate_in_integers, layers_in_float
from ab_jax.export.traced import TracedFunction, trace
from ab_jax.products import ActivationRules, initial_ranges, quantize_inputs
from ab_jax.quantizers import Quantized
from tests.export.exported_networks import NETWORKS, OPEN_AXES, coded, dequantized
from tests.export.onnx_answers import check_mostly
from tests.export.small_networks import CASES, make
from tests.fast_compilation import compiled

UNIT = 2.0**-6  # scales that are powers of two make all float32 arithmetic exact


def convolved(x: Any, kernel: Any, strides: Any, pads: Any, groups: int) -> Any:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def dense(params: Any, x: Any) -> Any:
    return x @ params["kernel"]


def graph_of(f: Any, params: Any, given: Any, shape: tuple[int, ...]) -> TracedFunction:
    """The layer behind codes of its input, by a quantizer, or behind its signs."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    if given == "sign":
        return trace(lambda p, x: f(p, sign(x, 1.0)), params, images)
    rules = ActivationRules([("kernel", given)])
    return trace(f, params, images, rules=rules, ranges={})


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
    "unsigned 8": (ActivationQuantizer(bits=8, signed=False, limit=255 * UNIT), 0, 255),
    "unsigned 4": (ActivationQuantizer(bits=4, signed=False, limit=15 * UNIT), 0, 15),
    "signed 8": (ActivationQuantizer(bits=8, signed=True, limit=127 * UNIT), -127, 127),
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

    def layer(params: Any, x: Any) -> Any:
        y = convolved(x, params["kernel"], stride, pads, groups)
        return y + params["bias"][None, None, None]

    params = {"kernel": kernel, "bias": bias}
    graph = graph_of(layer, params, quantize, (height, width, 4))
    assert layers_in_float(graph) == []
    found = compiled(
        lambda x: evaluate_in_integers(graph, x, as_matrices=True), jnp.float32(codes * UNIT)
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
        quantize, values = "sign", np.where(x >= 0, 1.0, -1.0)
    else:
        quantize, low, high = INPUTS[name]
        values = x = rng.integers(low, high + 1, (5, 300)) * UNIT
    graph = graph_of(dense, {"kernel": kernel}, quantize, (300,))
    assert layers_in_float(graph) == []
    found = compiled(lambda x: evaluate_in_integers(graph, x), jnp.float32(x))
    np.testing.assert_array_equal(found, (values @ weights) * scales)


def test_on_accelerators_a_convolution_is_one_of_int8(rng: np.random.Generator) -> None:
    kernel = kernel_of(rng, (3, 3, 4, 8), affine=False)
    layer = lambda p, x: convolved(x, p["kernel"], (1, 1), ((1, 1), (1, 1)), 1)
    graph = graph_of(layer, {"kernel": kernel}, INPUTS["signed 8"][0], (6, 6, 4))
    images = jax.ShapeDtypeStruct((2, 6, 6, 4), jnp.float32)
    lowered = jax.jit(lambda x: evaluate_in_integers(graph, x, as_matrices=False)).lower(images)
    (line,) = [line for line in lowered.as_text().splitlines() if "convolution" in line]
    assert "(tensor<2x8x8x4xi8>, tensor<3x3x4x8xi8>) -> tensor<2x6x6x8xi32>" in line


@pytest.mark.parametrize(("backend", "convolutions"), [("cpu", 0), ("gpu", 0), ("tpu", 1)])
def test_the_backend_decides_how_a_convolution_is_computed(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, backend: str, convolutions: int
) -> None:
    """XLA has no convolution for GPUs that sums int8 in int32."""
    kernel = kernel_of(rng, (3, 3, 4, 8), affine=False)
    layer = lambda p, x: convolved(x, p["kernel"], (1, 1), ((1, 1), (1, 1)), 1)
    graph = graph_of(layer, {"kernel": kernel}, INPUTS["signed 8"][0], (6, 6, 4))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    program = jax.make_jaxpr(lambda x: evaluate_in_integers(graph, x))(jnp.zeros((2, 6, 6, 4)))
    found = [equation.primitive.name for equation in program.jaxpr.eqns]
    assert found.count("conv_general_dilated") == convolutions
    assert found.count("dot_general") + found.count("jit") >= 1 - convolutions


def test_scales_within_a_sum_leave_a_layer_in_float(rng: np.random.Generator) -> None:
    kernel = kernel_of(rng, (6, 8), affine=False)
    scales = 2.0 ** rng.permutation(6)[:, None] * UNIT
    by_input = Quantized(kernel.codes, jnp.asarray(scales, jnp.float32), None, 8, "float32")
    graph = graph_of(dense, {"kernel": by_input}, INPUTS["signed 8"][0], (6,))
    assert layers_in_float(graph) == ["kernel"]
    codes = rng.integers(-127, 128, (2, 6))
    found = evaluate_in_integers(graph, jnp.float32(codes * UNIT))
    np.testing.assert_array_equal(found, (codes * UNIT) @ (np.asarray(kernel.codes) * scales))


@pytest.mark.parametrize("spatial", [1, 3])
def test_dilated_convolutions_of_other_layouts_sum_integers(
    rng: np.random.Generator, spatial: int
) -> None:
    """Channels first, over one and three axes, against NumPy's sum over taps in int64."""
    axes = "DHW"[3 - spatial :]
    window, sizes = (2,) * spatial, (6,) * spatial
    kernel = kernel_of(rng, (*window, 3, 5), affine=False)
    quantize, low, high = INPUTS["signed 8"]
    codes = rng.integers(low, high + 1, (2, 3, *sizes))
    layer = lambda p, x: lax.conv_general_dilated(
        x,
        p["kernel"],
        (1,) * spatial,
        "VALID",
        rhs_dilation=(2,) * spatial,
        dimension_numbers=(f"NC{axes}", f"{axes}IO", f"NC{axes}"),
    )
    graph = graph_of(layer, {"kernel": kernel}, quantize, (3, *sizes))
    assert layers_in_float(graph) == []
    weights, scales = exact(kernel)
    sums = np.zeros((2, *(4,) * spatial, 5), np.int64)
    images = np.moveaxis(codes, 1, -1)
    for at in np.ndindex(*window):
        places = tuple(slice(2 * i, 2 * i + 4) for i in at)
        sums += images[(slice(None), *places)] @ weights[at]
    wanted = np.moveaxis(sums * UNIT * scales, -1, 1)
    for as_matrices in (True, False):
        found = compiled(
            lambda x, way=as_matrices: evaluate_in_integers(graph, x, as_matrices=way),
            jnp.float32(codes * UNIT),
        )
        np.testing.assert_array_equal(found, wanted)


def test_codes_stay_codes_where_they_are_only_moved(rng: np.random.Generator) -> None:
    def f(params: Any, x: Any) -> Any:
        x = jnp.pad(x.reshape(x.shape[0], 4, 2).swapaxes(1, 2), ((0, 0), (0, 1), (0, 0)))
        return x[:, ::-1].reshape(x.shape[0], -1) @ params["kernel"]

    def signs(params: Any, x: Any) -> Any:
        return f(params, sign(x, 1.0) * 0.5)

    kernel = kernel_of(rng, (12, 3), affine=False)
    net = trace(signs, {"kernel": kernel}, jax.ShapeDtypeStruct((1, 8), jnp.float32))
    assert layers_in_float(net) == []
    x = rng.normal(size=(3, 8))
    values = np.where(x >= 0, 0.5, -0.5).reshape(3, 4, 2).swapaxes(1, 2)
    rows = np.pad(values, ((0, 0), (0, 1), (0, 0)))[:, ::-1].reshape(3, -1)
    weights, scales = exact(kernel)
    found = evaluate_in_integers(net, jnp.float32(x))
    np.testing.assert_array_equal(found, (rows @ weights) * scales)


@pytest.mark.parametrize("name", CASES)
def test_our_networks_run_in_integers_as_a_whole(name: str, rng: np.random.Generator) -> None:
    model, variables, shape = make(name, rng)
    net = inference(model, variables)
    images = jnp.asarray(rng.normal(size=(16, *shape)), jnp.float32)
    graph = trace(net.function, net.params, images, rules=net.rules, ranges=net.ranges).simplified()
    # The first layer of BinaryNet with signs sees images as they are.
    assert layers_in_float(graph) == (["conv0/kernel"] if "sign" in name else [])
    values = ab.dequantize(variables)
    wanted = compiled(lambda x: model.apply(values, x, train=False), images)
    found = compiled(lambda x: evaluate_in_integers(graph, x), images)
    largest = np.abs(wanted).max()
    # Rounding may move a value from one code to the next, which is seen in an image's logits.
    differences = np.abs(found - wanted).max(axis=1)
    assert np.mean(differences < 1e-5 * largest) > 0.6
    assert differences.max() < 0.1 * largest


#: Of the networks of others those that the usual run computes in integers.
EVERY_DAY = ("ViT", "Llama", "GELU and LayerNorm")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n not in EVERY_DAY)) for n in NETWORKS],
)
def test_networks_of_others_in_integers(name: str, rng: np.random.Generator) -> None:
    """Graphs of every framework computed by JAX: in floats as the function, in codes nearly so."""
    f, params, inputs = NETWORKS[name](rng)
    axis = 0 if name.startswith("equinox") else -1
    codes, axes = coded(params, 8, axis), OPEN_AXES.get(name)
    values = jax.tree.map(jnp.asarray, dequantized(codes))
    arrays = jax.tree.map(jnp.asarray, inputs)

    def of_graph(net: TracedFunction) -> list[Any]:
        return jax.tree.leaves(compiled(lambda *x: evaluate_in_integers(net, *x), *arrays))

    wanted = jax.tree.leaves(compiled(f, values, *arrays))
    plain = trace(f, codes, *inputs, open_axes=axes).simplified()
    for a, b in zip(of_graph(plain), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * (np.abs(b).max() + 1e-6))
    rules = ActivationRules([(r".*", ActivationQuantizer(bits=8, limit=127 / 32))])
    try:
        ranges = initial_ranges(f, rules, params, *inputs)
    except ValueError:
        return  # no product takes a rule
    net = trace(f, codes, *inputs, rules=rules, ranges=ranges, open_axes=axes).simplified()
    quantized = quantize_inputs(f, rules)
    by_rules = compiled(lambda p, *x: quantized(p, *x, ranges=ranges)[0], values, *arrays)
    check_mostly(of_graph(net), by_rules, wanted)
