"""ResNets: published sizes and costs, where they stride, and what they ask of their parts.

That the logits of ResNet-50 are right is shown beside the loading of weights, against Keras and
against a network written out (`test_pretrained.py`); the CIFAR networks are written out here.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from ab_jax.activations import relu
from ab_jax.models.resnet import (
    CIFAR,
    KERAS_V1,
    KERAS_V2,
    TIMM_V2,
    TORCHVISION,
    ResNet,
    Variant,
    resnet20,
    resnet50,
    resnet56,
)

# Table 1 of arXiv 1512.03385: features of the 3x3 and number of blocks of each stage.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def resnet50_counts(*, version: int, biases: str) -> dict[str, int]:
    """Parameters and statistics of ResNet-50, layer by layer."""
    convolutions, channels = 49 * 3 * 64, 64  # the stem
    normed, biased = (64, 0) if version == 1 else (0, 64)
    for features, blocks in STAGES:
        for block in range(blocks):
            convolutions += channels * features + 9 * features**2 + features * 4 * features
            if block == 0:
                convolutions += channels * 4 * features  # the projection
            projected = 4 * features if block == 0 else 0
            if version == 1:
                normed += features + features + 4 * features + projected
            else:
                normed += channels + features + features
                biased += 4 * features + projected  # what no norm follows
            channels = 4 * features
    normed += channels if version == 2 else 0
    biased = {"none": 0, "all": normed, "unnormalized": biased}[biases]
    head = channels * 1000 + 1000
    return {"params": convolutions + biased + 2 * normed + head, "batch_stats": 2 * normed}


@pytest.mark.parametrize(
    ("variant", "version", "biases", "published"),
    [
        (TORCHVISION, 1, "none", 25_557_032),  # torchvision counts parameters
        (KERAS_V1, 1, "all", 25_636_712),  # Keras counts the statistics too
        (KERAS_V2, 2, "unnormalized", 25_613_800),
        (TIMM_V2, 2, "none", 25_549_352),
    ],
)
def test_resnet50_has_the_published_sizes(
    sizes: Callable[..., dict[str, int]],
    variant: Variant,
    version: int,
    biases: str,
    published: int,
) -> None:
    found = sizes(resnet50(variant=variant))
    assert found == resnet50_counts(version=version, biases=biases)
    keras = variant in (KERAS_V1, KERAS_V2)
    assert found["params"] + (found["batch_stats"] if keras else 0) == published


@pytest.mark.parametrize(("network", "n", "millions"), [(resnet20, 3, 0.27), (resnet56, 9, 0.85)])
def test_cifar_networks_have_the_published_sizes(
    sizes: Callable[..., dict[str, int]], network: Any, n: int, millions: float
) -> None:
    kernels = 9 * 3 * 16 + 2 * n * 9 * 16 * 16
    for features in (32, 64):  # option A: shortcuts have no parameters
        kernels += 9 * features // 2 * features + (2 * n - 1) * 9 * features**2
    normed = 16 + 2 * n * (16 + 32 + 64)
    found = sizes(network())
    assert found == {"params": kernels + 2 * normed + 64 * 10 + 10, "batch_stats": 2 * normed}
    assert round(found["params"] / 1e6, 2) == millions  # table 6 of the paper


@pytest.mark.parametrize(
    ("variant", "billions"),
    # The first paper's table 1 says 3.8 where the first 1x1 strides; torchvision 4.09 for its own.
    [(KERAS_V1, 3.86), (TORCHVISION, 4.09), (TIMM_V2, 4.09), (KERAS_V2, 3.48)],
)
def test_multiply_adds_are_the_published_ones(
    products: Callable[..., Any], variant: Variant, billions: float
) -> None:
    found = products(resnet50(variant=variant), (224, 224, 3))
    assert len(found) == 1 + 16 * 3 + 4 + 1
    assert round(sum(count for _, count, _ in found) / 1e9, 2) == billions


def sides(model: ResNet, side: int) -> dict[str, int]:
    """The side of the input of every convolution."""
    seen = {}

    def watched(module: Any, layer: str, x: jax.Array, alpha: Any) -> jax.Array:
        if x.ndim == 4:
            seen["/".join((*module.path, layer))] = x.shape[1]
        return x

    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    watching = model.clone(quantize_input=watched)
    jax.eval_shape(lambda x: watching.init(jax.random.key(0), x, train=False), images)
    return seen


def test_where_the_variants_stride() -> None:
    small = partial(ResNet, stage_sizes=(2, 2), width=1 / 64, stem=32)
    found = sides(small(variant=TORCHVISION), 32)
    assert found["stage0_block1/conv2"] == 32
    assert [found[f"stage1_block0/conv{i}"] for i in range(3)] == [32, 32, 16]
    found = sides(small(variant=KERAS_V1), 32)
    assert [found[f"stage1_block0/conv{i}"] for i in range(3)] == [32, 16, 16]
    found = sides(small(variant=KERAS_V2), 32)
    assert [found[f"stage0_block1/conv{i}"] for i in range(3)] == [32, 32, 16]
    assert {side for name, side in found.items() if "stage1" in name} == {16}


@pytest.mark.parametrize(("stem", "side"), [(224, 56), (64, 112), (32, 224)])
def test_stem_sets_the_first_strides(stem: int, side: int) -> None:
    found = sides(resnet50(width=1 / 64, stem=stem), 224)
    assert found["stem"] == 224
    assert [found[f"stage{i}_block2/conv0"] for i in range(4)] == [side // 2**i for i in range(4)]


def reference_logits(variables: Any, images: np.ndarray, blocks: int) -> np.ndarray:
    """Section 4.2 of the first paper at test time, in numpy: shortcuts of option A."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["batch_stats"])

    def layer(x: np.ndarray, at: list[str], name: str, stride: int = 1) -> np.ndarray:
        weights, statistics = params, stats
        for key in at:
            weights, statistics = weights[key], statistics[key]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
        y = np.einsum("nhwcij,ijco->nhwo", windows, weights[name]["kernel"])
        norm, measured = weights[f"{name}_norm"], statistics[f"{name}_norm"]
        y = (y - measured["mean"]) / np.sqrt(measured["var"] + 1e-5)
        return y * norm["scale"] + norm["bias"]

    x = np.maximum(layer(images.astype(np.float64), [], "stem"), 0)
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            at = [f"stage{stage}_block{block}"]
            y = np.maximum(layer(x, at, "conv0", stride), 0)
            y = layer(y, at, "conv1")
            shortcut = x[:, ::stride, ::stride]
            new = np.zeros((*shortcut.shape[:3], y.shape[3] - shortcut.shape[3]))
            x = np.maximum(y + np.concatenate([shortcut, new], axis=3), 0)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def test_cifar_logits_equal_the_network_written_out(
    rng: np.random.Generator, random_variables: Callable[..., Any]
) -> None:
    model = resnet20(width=1 / 4)
    variables = random_variables(model, (16, 16, 3))
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    expected = reference_logits(variables, images, blocks=3)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("variant", [TORCHVISION, TIMM_V2, CIFAR])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_every_layer_asks_for_its_quantized_input_once(
    shapes: Callable[..., Any], variant: Variant, bottleneck: bool
) -> None:
    asked, activated = [], []

    def watched(module: Any, layer: str, x: jax.Array, alpha: Any) -> jax.Array:
        asked.append(("/".join((*module.path, layer)), alpha))
        return x

    def activation(x: jax.Array, alpha: Any) -> jax.Array:
        activated.append(alpha)
        return relu(x, alpha)

    model = ResNet((1, 2), 8, bottleneck, variant, quantize_input=watched, activation=activation)
    variables = shapes(model, (32, 32, 3))
    asked.clear(), activated.clear()
    images = jnp.zeros((1, 32, 32, 3))
    jax.eval_shape(lambda v: model.apply(v, images, train=False, alpha=0.625), variables)
    flat = jax.tree.leaves_with_path(variables["params"])
    paths = ["/".join(key.key for key in path) for path, _ in flat]
    kernels = [path.removesuffix("/kernel") for path in paths if path.endswith("/kernel")]
    assert sorted(asked) == sorted((kernel, 0.625) for kernel in kernels)
    assert any("shortcut" in kernel for kernel in kernels) == (variant is not CIFAR)
    # Each block has one a convolution, the rest of the network one: the stem's or the last.
    assert activated == [0.625] * (1 + 3 * (3 if bottleneck else 2))


def test_norms_follow_the_layer_they_are_named_after(shapes: Callable[..., Any]) -> None:
    """The folding of norms into convolutions goes by these names."""
    for variant in (TORCHVISION, TIMM_V2):
        params = shapes(ResNet((1, 1), 8, variant=variant), (32, 32, 3))["params"]
        for block in ("stage0_block0", "stage1_block0"):
            for name, leaves in params[block].items():
                layer = name.removesuffix("_norm")
                if layer not in (name, "input"):
                    assert leaves["scale"].shape == params[block][layer]["kernel"].shape[-1:]
        outside = {name for name in params if name.endswith("_norm")}
        assert outside == {"stem_norm" if variant.version == 1 else "output_norm"}


@pytest.mark.parametrize("variant", [KERAS_V1, KERAS_V2])
def test_bfloat16_computes_in_it_and_keeps_float32_around(
    shapes: Callable[..., Any], products: Callable[..., Any], variant: Variant
) -> None:
    model = ResNet((1, 1), 8, variant=variant, dtype=jnp.bfloat16)
    variables = shapes(model, (32, 32, 3))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    results = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, results))} == {np.dtype(np.float32)}
    computed = [dtype for _, _, dtype in products(model, (32, 32, 3))]
    assert computed == [jnp.bfloat16] * 10


def test_training_moves_every_statistic_and_reaches_every_parameter(
    rng: np.random.Generator, random_variables: Callable[..., Any]
) -> None:
    model = resnet20(width=1 / 4, variant=dataclasses.replace(CIFAR, version=2))
    variables = random_variables(model, (16, 16, 3))
    images = jnp.asarray(rng.normal(size=(4, 16, 16, 3)), jnp.float32)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params: Any) -> Any:
        logits, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return (logits**2).sum(), updated["batch_stats"]

    gradients, statistics = gradient(variables["params"])
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), statistics, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"version of a ResNet is one of \(1, 2\), not 3"),
        ({"shortcut": "A"}, "shortcut of a ResNet is one of .*'pad'.*, not 'A'"),
        ({"padding": "valid"}, "padding of a ResNet"),
    ],
)
def test_a_variant_that_there_is_not_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Variant(**change)


def test_stems_and_images_that_there_are_not_are_refused() -> None:
    for model, shape, message in (
        (resnet20(stem=28), (1, 32, 32, 3), "224, 64 or 32, not 28"),
        (resnet20(), (32, 32, 3), r"not \(32, 32, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda m=model, s=shape: m.init(jax.random.key(0), jnp.zeros(s), train=False)
            )
