"""BinaryNet: the published sizes, and its logits against a network written out with jax.lax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.activations import Activation, relu, sign
from ab_jax.models.binarynet import BinaryNet

# 2x(128C3)-MP2-2x(256C3)-MP2-2x(512C3)-MP2-2x1024FC-10 on images of 32 x 32 pixels and 3 colours:
# three poolings leave 4 x 4 x 512 = 8192 inputs of the first dense layer.
KERNELS = {
    "conv0": (3, 3, 3, 128),
    "conv1": (3, 3, 128, 128),
    "conv2": (3, 3, 128, 256),
    "conv3": (3, 3, 256, 256),
    "conv4": (3, 3, 256, 512),
    "conv5": (3, 3, 512, 512),
    "dense0": (8192, 1024),
    "dense1": (1024, 1024),
    "head": (1024, 10),
}
LAYERS = list(KERNELS)


def shapes(model: BinaryNet, image_shape: tuple[int, ...]) -> Any:
    """Shapes of the variables, nothing computed."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda images: model.init(jax.random.key(0), images, train=True), images)


def random_variables(
    model: BinaryNet, image_shape: tuple[int, ...], rng: np.random.Generator
) -> Any:
    """Random weights and statistics; scales of both signs, so that the order of layers matters."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        match path[-1].key:
            case "kernel":
                values = rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
            case "var":
                values = rng.uniform(0.5, 2, leaf.shape)
            case _:
                values = rng.normal(size=leaf.shape)
        return values.astype(leaf.dtype)

    return jax.tree.map_with_path(draw, shapes(model, image_shape))


def reference_logits(variables: Any, images: np.ndarray, activation: Activation) -> jax.Array:
    """The network at test time: convolution, pooling, batch norm, activation, in that order."""

    def norm(x: jax.Array, name: str) -> jax.Array:
        scale_shift, stats = (
            variables[collection][f"{name}_norm"] for collection in ("params", "batch_stats")
        )
        factor = scale_shift["scale"] / jnp.sqrt(stats["var"] + 1e-5)
        shift = scale_shift["bias"] - stats["mean"] * factor
        return x * factor.reshape(*[1] * (x.ndim - 1), -1) + shift.reshape(*[1] * (x.ndim - 1), -1)

    x = jnp.asarray(images)
    for name in LAYERS[:6]:
        kernel = variables["params"][name]["kernel"]
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if name in ("conv1", "conv3", "conv5"):
            n, height, width, channels = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
        x = activation(norm(x, name), 1.0)
    x = x.reshape(len(x), -1)
    for name in LAYERS[6:8]:
        x = activation(norm(x @ variables["params"][name]["kernel"], name), 1.0)
    return norm(x @ variables["params"]["head"]["kernel"], "head")


def test_full_size_is_the_published_architecture() -> None:
    variables = shapes(BinaryNet(), (32, 32, 3))
    params = variables["params"]
    kernels = {name: leaf["kernel"].shape for name, leaf in params.items() if "kernel" in leaf}
    assert kernels == KERNELS
    assert set(variables) == {"params", "batch_stats"}

    # Batch norm after each of the nine layers: a scale and a bias, a mean and a variance.
    channels = 128 + 128 + 256 + 256 + 512 + 512 + 1024 + 1024 + 10
    assert params["head_norm"]["bias"].shape == (10,)
    weights = sum(math.prod(shape) for shape in KERNELS.values())
    assert weights == 14_022_016
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == weights + 2 * channels
    statistics = jax.tree.leaves(variables["batch_stats"])
    assert sum(math.prod(leaf.shape) for leaf in statistics) == 2 * channels


@pytest.mark.parametrize(
    ("width", "features"),
    [(0.125, [16, 16, 32, 32, 64, 64, 128, 128, 7]), (1e-6, [1] * 8 + [7]), (2, None)],
)
def test_width_multiplies_the_features_of_hidden_layers(
    width: float, features: list[int] | None
) -> None:
    params = shapes(BinaryNet(num_classes=7, width=width), (16, 16, 1))["params"]
    if features is None:
        features = [*(2 * KERNELS[name][-1] for name in LAYERS[:-1]), 7]
    assert [params[name]["kernel"].shape[-1] for name in LAYERS] == features
    assert params["dense0"]["kernel"].shape[0] == 4 * features[5]


@pytest.mark.parametrize(
    ("activation", "image_shape", "batch"),
    # 16 pixels leave 2 x 2 positions to flatten. Few inputs for the sign: one in ten million of
    # them is so close to 0 that rounding decides it.
    [(relu, (16, 16, 3), 5), (sign, (8, 8, 1), 1)],
)
def test_logits_equal_the_network_written_out(
    rng: np.random.Generator, activation: Activation, image_shape: tuple[int, ...], batch: int
) -> None:
    model = BinaryNet(width=1 / 32, activation=activation)
    variables = random_variables(model, image_shape, rng)
    images = rng.normal(size=(batch, *image_shape)).astype(np.float32)

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False)  # alpha is 1 unless given

    logits = jax.jit(apply)(variables, images)
    expected = jax.jit(reference_logits, static_argnums=2)(variables, images, activation)
    # Nine layers in float32, of sums of up to 300 terms; the norm's terms are grouped differently.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.shape == (batch, 10)


def test_alpha_reaches_every_activation(rng: np.random.Generator) -> None:
    seen = []

    def watched(x: jax.Array, alpha: float) -> jax.Array:
        seen.append(float(alpha))
        return jax.nn.relu(x)

    model = BinaryNet(width=1e-6, activation=watched)
    variables = random_variables(model, (8, 8, 1), rng)
    seen.clear()
    images = jnp.zeros((1, 8, 8, 1))
    jax.eval_shape(lambda v: model.apply(v, images, train=False, alpha=0.625), variables)
    assert seen == [0.625] * 8  # none after the head


def test_training_moves_running_statistics_by_the_momentum(rng: np.random.Generator) -> None:
    model = BinaryNet(width=1e-6, batch_stats_momentum=0.75)
    variables = random_variables(model, (8, 8, 1), rng)
    images = rng.normal(size=(6, 8, 8, 1)).astype(np.float32)

    def apply(variables: Any) -> Any:
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    _, updated = jax.jit(apply)(variables)
    # The first layer's statistics by hand: 1 channel, 3x3 taps, zero padding, no pooling.
    kernel = variables["params"]["conv0"]["kernel"][:, :, 0, 0]
    padded = np.pad(images[..., 0], ((0, 0), (1, 1), (1, 1)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    outputs = sum(kernel[i, j] * padded[:, i : i + 8, j : j + 8] for i, j in taps)
    old, new = (v["batch_stats"]["conv0_norm"] for v in (variables, updated))
    for name, measured in (("mean", outputs.mean()), ("var", outputs.var())):
        wanted = 0.75 * old[name] + 0.25 * measured
        np.testing.assert_allclose(new[name], wanted, rtol=1e-4, atol=1e-6)


def test_bfloat16_computes_in_it_and_keeps_float32_around() -> None:
    model = BinaryNet(width=1 / 32, dtype=jnp.bfloat16)
    variables = shapes(model, (8, 8, 1))
    images = jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32)

    def apply(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    program, results = jax.make_jaxpr(apply, return_shape=True)(variables, images)
    kept = jax.tree.leaves((variables, results))  # logits and new statistics
    assert {leaf.dtype for leaf in kept} == {np.dtype(np.float32)}
    computed = [
        equation.invars[0].aval.dtype
        for equation in program.jaxpr.eqns
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert computed == [jnp.bfloat16] * len(LAYERS)


@pytest.mark.parametrize("shape", [(1, 12, 12, 3), (1, 16, 8, 3), (16, 16, 3)])
def test_images_of_other_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"square images.*multiple of 8") as error:
        BinaryNet().init(jax.random.key(0), jnp.zeros(shape), train=False)
    assert str(shape) in str(error.value)
    assert "--image_size" in str(error.value)
