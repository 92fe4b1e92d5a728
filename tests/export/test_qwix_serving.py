"""Qwix's kernels with our codes: the integers' own sums, and the outputs of our networks."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.qwix import InputCodes, input_codes, serve, to_qwix
from ab_jax.linen import RANGES, WithQuantizedInputs, layer_paths
from ab_jax.models.convolution import cpu_conv_general_dilated
from ab_jax.products import ActivationRules

IMAGES = (2, 6, 6, 3)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Net(nn.Module):
    """Each kind of layer that is served, and one whose parameters stay in float."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        x = nn.LayerNorm(name="norm")(x)
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x))
        x = nn.relu(nn.Dense(8, name="hidden")(x.mean((1, 2))))
        return nn.DenseGeneral((2, 3), name="head")(x)


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    shapes = jax.eval_shape(lambda x: Net().init(jax.random.key(0), x), images)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes["params"])


def rules(**quantizers: ab.Quantizer) -> ab.Rules:
    """8 bits but for the layers that are named."""
    named = [(f"{name}/kernel", quantizer) for name, quantizer in quantizers.items()]
    return ab.Rules([*named, (".*/kernel", ab.Uniform(bits=8, scale="absmax")), (".*", None)])


def run(function: Callable[..., Any], *args: Any) -> tuple[np.ndarray, str]:
    """What a function returns, and its program; compiled fast, whatever it then takes."""
    lowered = jax.jit(function).lower(*args)
    return np.asarray(lowered.compile(compiler_options=FAST)(*args)), lowered.as_text()


def draw(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=IMAGES).astype(np.float32)


def test_weights_alone_give_our_outputs(params: dict[str, Any], rng: np.random.Generator) -> None:
    """Also with zero points and groups, which Qwix dequantizes."""
    quantized = ab.quantize(
        params,
        rules(
            stem=ab.Uniform(bits=3, symmetric=False, scale="absmax", axis=(-2, -1)),
            depthwise=ab.Binary(),
            hidden=ab.Uniform(bits=4, symmetric=False, scale="absmax", group_size=2),
        ),
    )
    images = draw(rng)
    served, variables = serve(Net(), to_qwix({"params": quantized}), images)
    found, _ = run(served.apply, variables, images)
    expected, _ = run(Net().apply, {"params": ab.dequantize(quantized)}, images)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


class Partitioned(nn.Module):
    """Whose parameters say where they lie."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("in", "out"))
        return nn.Dense(4, kernel_init=init, name="head")(x)


def test_partitioned_parameters_are_served_in_their_boxes_or_without(
    rng: np.random.Generator,
) -> None:
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    params = Partitioned().init(jax.random.key(0), x)["params"]
    quantized = {"params": ab.quantize(params, rules())}
    expected = Partitioned().apply(ab.dequantize(quantized), x)
    for variables in (to_qwix(quantized), to_qwix(nn.unbox(quantized))):
        served, variables = serve(Partitioned(), variables, x)
        found = served.apply(variables, x)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


class One(nn.Module):
    """A single layer, by the name of its kind."""

    conv: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.conv:
            return nn.Conv(5, (3, 3), strides=2, padding=1, use_bias=False, name="layer")(x)
        return nn.Dense(5, use_bias=False, name="layer")(x)


def products_of_integers(x: np.ndarray, w: np.ndarray, conv: bool) -> np.ndarray:
    """The layer's sums, by definition."""
    if not conv:
        return x @ w
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    return np.einsum("bhwcij,ijco->bhwo", windows, w)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (8, True), (3, False)])
def test_a_layer_sums_the_very_integers(
    rng: np.random.Generator, conv: bool, bits: int, signed: bool
) -> None:
    """Of inputs within the range and beyond both ends."""
    kernel = rng.normal(size=(3, 3, 4, 5) if conv else (4, 5)).astype(np.float32)
    x = rng.normal(size=(2, 5, 5, 4) if conv else (7, 4)).astype(np.float32)
    weight = ab.Uniform(bits=6, scale="absmax").quantize(kernel)
    codes = InputCodes(bits=bits, signed=signed, limit=float(rng.uniform(1, 2)))
    of_input = ActivationQuantizer(bits=bits, signed=signed, limit=codes.limit)

    variables = to_qwix({"params": {"layer": {"kernel": weight}}})
    served, variables = serve(One(conv), variables, x, inputs={"layer": codes})
    found, text = run(served.apply, variables, x)

    integers = np.asarray(of_input.codes(x, codes.limit), np.int64)
    sums = products_of_integers(integers, np.asarray(weight.codes, np.int64), conv)
    step = np.float64(of_input.scale(codes.limit))
    expected = sums * step * np.asarray(weight.scale, np.float64).reshape(-1)
    # The sum is exact; three roundings follow.
    np.testing.assert_allclose(found, expected, rtol=5e-7)

    kind = "convolution" if conv else "dot_general"
    made = re.findall(rf"stablehlo\.{kind}\b.*tensor<[\dx]+xi8>, tensor<[\dx]+xi8>", text)
    # What stands for zero is convolved, too, where codes do not fit into 8 bits with sign.
    assert len(made) == (2 if bits == 8 and not signed else 1)


def test_a_network_with_quantized_inputs_gives_our_outputs(
    params: dict[str, Any], rng: np.random.Generator
) -> None:
    activations = ActivationRules(
        [
            ("stem", ActivationQuantizer(bits=8, signed=True)),
            ("hidden", None),
            ("depthwise", ActivationQuantizer(bits=4, signed=True)),
            (".*", ActivationQuantizer(bits=8, signed=False)),
        ]
    )
    images = rng.normal(size=(8, *IMAGES[1:])).astype(np.float32)
    quantized = ab.quantize(params, rules(depthwise=ab.Ternary()))
    ranges = {
        name: {"kernel": jnp.float32(rng.uniform(1, 2))} for name in ("stem", "depthwise", "head")
    }
    variables = {"params": quantized, RANGES: ranges}
    model = WithQuantizedInputs(Net(), activations)
    expected, _ = run(model.apply, ab.dequantize(variables), images)
    inputs = input_codes(variables, activations, layer_paths(Net(), images))
    assert inputs.keys() == ranges.keys()
    served, variables = serve(model, to_qwix(variables), images, inputs=inputs)
    found, _ = run(served.apply, variables, images)
    # A sum's last bit may, seldom, move an activation to its next step, of 15 that there are.
    apart = np.abs(found - expected) / np.ptp(expected)
    assert np.median(apart) < 1e-5
    assert np.max(apart) < 0.2


BITS8 = InputCodes(bits=8, signed=False, limit=1.0)
SIGNED = InputCodes(bits=8, signed=True, limit=1.0)


@pytest.mark.parametrize(
    ("quantizer", "inputs", "options", "message"),
    [
        ({"group_size": 1}, {"stem": SIGNED}, {}, "stem/kernel has scales of shape"),
        ({"symmetric": False}, {"stem": SIGNED}, {}, "stem/kernel has zero points.*with symmetric"),
        (
            {},
            {"stem": SIGNED},
            {"int4": True},
            r"stem/kernel has codes of int4, but its input codes from -127 to 127.*int4=False",
        ),
        ({}, {"norm": SIGNED}, {}, "The input of norm has codes, but its kernel"),
    ],
)
def test_what_qwix_cannot_compute_is_refused_by_name(
    params: dict[str, Any],
    quantizer: dict[str, Any],
    inputs: dict[str, InputCodes],
    options: dict[str, Any],
    message: str,
) -> None:
    made = ab.Uniform(bits=4, scale="absmax", **quantizer)
    variables = to_qwix({"params": ab.quantize(params, rules(stem=made))}, **options)
    with pytest.raises(ValueError, match=message):
        serve(Net(), variables, jax.ShapeDtypeStruct(IMAGES, jnp.float32), inputs=inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "hidden": shifted(p["hidden"])}, "hidden/kernel has zero points"),
        (lambda p: {k: v for k, v in p.items() if k != "norm"}, "lack the parameter norm/"),
        (
            lambda p: {**p, "hidden": {**p["hidden"], "bias": jnp.ones(9)}},
            r"hidden/bias is of shape \(9,\), and of \(8,\) in the model",
        ),
        (lambda p: {**p, "norm": p["hidden"]}, "norm/kernel has codes, but it is no kernel of a"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(
    params: dict[str, Any], change: Callable[[Any], Any], message: str
) -> None:
    changed = {"params": change(ab.quantize(params, rules()))}
    with pytest.raises(ValueError, match=message):
        serve(Net(), to_qwix(changed), jnp.zeros(IMAGES), inputs={"hidden": BITS8})


def shifted(layer: dict[str, Any]) -> dict[str, Any]:
    quantizer = ab.Uniform(bits=4, symmetric=False, scale="absmax")
    return {**layer, "kernel": quantizer.quantize(layer["kernel"].dequantize())}


def test_a_layer_with_functions_of_its_own_is_refused() -> None:
    conv = nn.Conv(
        4,
        (3, 3),
        feature_group_count=4,
        use_bias=False,
        conv_general_dilated=cpu_conv_general_dilated,
    )
    kernel = ab.Uniform(bits=8, scale="absmax").quantize(jnp.ones((3, 3, 1, 4)))
    with pytest.raises(ValueError, match=r"kernel has codes.*cpu_convolutions=False"):
        serve(conv, to_qwix({"params": {"kernel": kernel}}), jnp.ones((2, 5, 5, 4)))


def test_a_layer_of_16_bits_is_refused_where_its_input_has_codes() -> None:
    kernel = ab.Uniform(bits=8, scale="absmax").quantize(jnp.ones((4, 5)))
    model = nn.Dense(5, use_bias=False, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"computes in bfloat16.*dtype=float32"):
        serve(model, to_qwix({"params": {"kernel": kernel}}), jnp.ones((2, 4)), inputs={"": BITS8})


# Layers that Flax lifts


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return nn.relu(nn.Dense(4, name="dense")(x)), None


def scanned(name: str | None = None) -> nn.Module:
    layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return layers(name=name)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return scanned("layers")(x, None)[0]


@pytest.mark.parametrize("axis", [-1, (0, -1)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_stack_is_served_with_a_range_a_layer(
    rng: np.random.Generator, axis: Any, signed: bool
) -> None:
    """Scales of the kernels by layer, or shared by all of them."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    params = Stack().init(jax.random.key(0), x)["params"]
    weights = ab.Uniform(bits=6, scale="absmax", axis=axis)
    quantized = ab.quantize(params, ab.Rules([(".*/kernel", weights), (".*", None)]))
    quantizer = ActivationQuantizer(bits=8, signed=signed)
    activations = ActivationRules([(".*", quantizer)])
    limits = rng.uniform(0.5, 2, 3).astype(np.float32)
    variables = {"params": quantized, RANGES: {"layers": {"dense": {"kernel": limits}}}}
    inputs = input_codes(variables, activations, layer_paths(Stack(), x))
    served, form = serve(Stack(), to_qwix(variables), x, inputs=inputs)
    found, text = run(served.apply, form, x)
    assert re.search(r"stablehlo\.dot_general\b.*tensor<[\dx]+xi8>, tensor<[\dx]+xi8>", text)
    expected = x.astype(np.float64)
    kernels = ab.dequantize(quantized)["layers"]["dense"]["kernel"]
    for kernel, limit in zip(np.asarray(kernels, np.float64), limits, strict=True):
        codes = np.asarray(quantizer.codes(jnp.asarray(expected, jnp.float32), limit), np.float64)
        expected = np.maximum(codes * float(quantizer.scale(limit)) @ kernel, 0)
    # A sum's last bit may, seldom, move an activation to its next step.
    assert np.median(np.abs(found - expected)) < 1e-5
    assert np.max(np.abs(found - expected)) < 0.05

    wrong = {"layers/dense": InputCodes(bits=8, signed=signed, limit=(1.0, 2.0))}
    with pytest.raises(ValueError, match=r"input of layers/dense have 2 ranges, which do not fit"):
        serve(Stack(), to_qwix(variables), x, inputs=wrong)


def test_a_stack_that_is_the_model_itself_is_refused() -> None:
    x = jnp.ones((2, 4))
    params = scanned().init(jax.random.key(0), x, None)["params"]
    weights = ab.Uniform(bits=8, scale="absmax")
    quantized = ab.quantize(params, ab.Rules([(".*/kernel", weights), (".*", None)]))
    with pytest.raises(ValueError, match=r"dense/\w+ is a stack of 3 layers.*within a module"):
        serve(scanned(), to_qwix({"params": quantized}), x, None)


def test_inputs_of_a_loop_are_refused_by_name() -> None:
    x = jnp.ones((2, 3, 3))
    model = nn.RNN(nn.SimpleCell(4))
    weights = ab.Uniform(bits=8, scale="absmax")
    quantized = ab.quantize(
        model.init(jax.random.key(0), x)["params"],
        ab.Rules([(".*/kernel", weights), (".*", None)]),
    )
    with pytest.raises(ValueError, match=r"input of cell/i has codes, but this layer lies within"):
        serve(model, to_qwix({"params": quantized}), x, inputs={"cell/i": SIGNED})
