"""MobileNet: the published size and cost, its variants, and what it asks of its parts.

That its logits are right is shown beside the loading of weights, against Keras and against a
network written out (`test_pretrained.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ab_jax.activations import relu6
from ab_jax.models.mobilenet import MobileNet

LAYERS = [
    "stem",
    *(f"block{i}/{kind}" for i in range(13) for kind in ("depthwise", "pointwise")),
    "head",
]


def test_full_size_is_the_published_network(sizes: Callable[..., dict[str, int]]) -> None:
    # Table 1 of the paper: what each pair of convolutions takes and gives.
    pairs = [(32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    pairs += [(512, 512)] * 5 + [(512, 1024), (1024, 1024)]
    kernels = 9 * 3 * 32 + sum(9 * i + i * o for i, o in pairs) + 1024 * 1000
    normed = 32 + sum(i + o for i, o in pairs)
    found = sizes(MobileNet())
    assert found == {"params": kernels + 1000 + 2 * normed, "batch_stats": 2 * normed}
    assert sum(found.values()) == 4_253_864  # as Keras counts its MobileNet


def test_multiply_adds_are_the_published_ones(products: Callable[..., Any]) -> None:
    found = products(MobileNet(cpu_convolutions=False), (224, 224, 3))
    assert len(found) == len(LAYERS)
    assert round(sum(count for _, count, _ in found) / 1e6) == 569  # table 4 of the paper


@pytest.mark.parametrize(("stem", "sides"), [
    (224, [112, 56, 28, 14, 7]),
    (64, [224, 112, 56, 28, 14]),
    (32, [224, 112, 56, 28]),
])  # fmt: skip
def test_stem_sets_the_strides(stem: int, sides: list[int]) -> None:
    seen = []

    def watched(module: nn.Module, layer: str, x: jax.Array, alpha: Any) -> jax.Array:
        seen.append(x.shape[1])
        return x

    model = MobileNet(width=1 / 32, stem=stem, quantize_input=watched)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    assert seen.pop(0) == 224  # the images; the head's input is no image
    assert list(dict.fromkeys(seen[:-1])) == sides


def test_width_multiplies_the_features_of_hidden_layers(shapes: Callable[..., Any]) -> None:
    params = shapes(MobileNet(num_classes=7, width=0.25), (32, 32, 1))["params"]
    assert params["stem"]["kernel"].shape == (3, 3, 1, 8)
    assert params["block12"]["depthwise"]["kernel"].shape == (3, 3, 1, 256)
    assert params["head"]["kernel"].shape == (256, 7)
    params = shapes(MobileNet(width=1e-6), (32, 32, 1))["params"]
    assert params["block3"]["pointwise"]["kernel"].shape == (1, 1, 1, 1)


def test_every_layer_asks_for_its_quantized_input_once(shapes: Callable[..., Any]) -> None:
    asked, activated = [], []

    def watched(module: nn.Module, layer: str, x: jax.Array, alpha: Any) -> jax.Array:
        asked.append(("/".join((*module.path, layer)), alpha))
        return x

    def activation(x: jax.Array, alpha: Any) -> jax.Array:
        activated.append(alpha)
        return relu6(x, alpha)

    model = MobileNet(width=1 / 32, quantize_input=watched, activation=activation)
    variables = shapes(model, (32, 32, 3))
    asked.clear(), activated.clear()
    images = jnp.zeros((1, 32, 32, 3))
    jax.eval_shape(lambda v: model.apply(v, images, train=False, alpha=0.625), variables)
    assert asked == [(layer, 0.625) for layer in LAYERS]
    assert activated == [0.625] * (len(LAYERS) - 1)  # none after the head
    for layer in LAYERS:
        params = variables["params"]
        for part in layer.split("/"):
            params = params[part]
        assert "kernel" in params


def test_the_quantized_input_is_what_a_layer_sees(random_variables: Callable[..., Any]) -> None:
    """An input of zeros leaves the head with its bias alone."""

    def zeroed(module: nn.Module, layer: str, x: jax.Array, alpha: Any) -> jax.Array:
        return jnp.zeros_like(x) if layer == "head" else x

    model = MobileNet(num_classes=3, width=1 / 32, quantize_input=zeroed)
    variables = random_variables(model, (32, 32, 3))
    images = jnp.ones((1, 32, 32, 3))
    logits = jax.jit(lambda v: model.apply(v, images, train=False))(variables)
    np.testing.assert_array_equal(logits[0], variables["params"]["head"]["bias"])


@pytest.mark.long
def test_convolutions_for_cpus_agree_with_those_of_xla(
    rng: np.random.Generator, random_variables: Callable[..., Any]
) -> None:
    grouped, shifted, default = (
        MobileNet(num_classes=3, width=1 / 16, cpu_convolutions=choice)
        for choice in (False, True, None)
    )
    variables = random_variables(grouped, (32, 32, 3))
    images = jnp.asarray(rng.normal(size=(8, 64, 64, 3)), jnp.float32)

    def outputs(model: MobileNet, variables: Any) -> Any:
        """Logits and new statistics; that the gradients agree is shown for one convolution."""
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    expected, found = (jax.jit(partial(outputs, model))(variables) for model in (grouped, shifted))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    convolutions = [
        str(jax.make_jaxpr(partial(outputs, model))(variables)).count("conv_general_dilated[")
        for model in (grouped, shifted, default)
    ]
    assert convolutions == [27, 1, 1]  # on the CPU, which tests run on, it is the default


@pytest.mark.parametrize("own_params", [False, True])
def test_devices_share_a_batch(
    shapes: Callable[..., Any], devices: list[jax.Device], own_params: bool
) -> None:
    """With parameters that vary over the devices in type, as in the trainer's step, and without."""
    model = MobileNet(num_classes=3, width=1 / 32, cpu_convolutions=True)
    variables = shapes(model, (32, 32, 3))

    def gradient(params: Any, stats: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            given = {"params": params, "batch_stats": stats}
            return jnp.sum(model.apply(given, images, train=False))

        if not own_params:
            return jax.grad(loss)(params)
        return jax.lax.psum(jax.grad(loss)(jax.lax.pcast(params, "x", to="varying")), "x")

    mapped = jax.shard_map(
        gradient, mesh=Mesh(np.array(devices), ("x",)), in_specs=(P(), P(), P("x")), out_specs=P()
    )
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    found = jax.eval_shape(mapped, variables["params"], variables["batch_stats"], images)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables["params"])


def test_training_moves_running_statistics_by_the_momentum(
    rng: np.random.Generator, random_variables: Callable[..., Any]
) -> None:
    model = MobileNet(width=1 / 32, batch_stats_momentum=0.75)
    variables = random_variables(model, (32, 32, 3))
    images = jnp.asarray(rng.normal(size=(2, 32, 32, 3)), jnp.float32)

    def apply(variables: Any) -> Any:
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    _, updated = jax.jit(apply)(variables)
    kernel = variables["params"]["stem"]["kernel"]
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), [(0, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # what "same" padding is for an even side
    old, new = (v["batch_stats"]["stem_norm"]["mean"] for v in (variables, updated))
    expected = 0.75 * old + 0.25 * outputs.mean((0, 1, 2))
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32_around(
    shapes: Callable[..., Any], products: Callable[..., Any]
) -> None:
    model = MobileNet(width=1 / 32, dtype=jnp.bfloat16, cpu_convolutions=False)
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
        seen.append(type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        shapes(MobileNet(width=1 / 32, conv=Conv, norm=Norm), (32, 32, 3))
    assert seen.count(Conv) == seen.count(Norm) == 27
    assert nn.Conv not in seen
    assert nn.BatchNorm not in seen


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"stem": 28}, (1, 32, 32, 3), "224, 64 or 32, not 28"),
        ({"padding": "valid"}, (1, 32, 32, 3), '"same" or "symmetric", not \'valid\''),
        ({}, (32, 32, 3), r"not \(32, 32, 3\)"),
    ],
)
def test_what_there_is_not_is_refused(fields: Any, shape: Any, message: str) -> None:
    model = MobileNet(width=1 / 32, **fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))
