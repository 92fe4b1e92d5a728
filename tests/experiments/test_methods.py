"""Methods by name: their estimators, and layers in the order in which a network calls them."""

import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.models.binarynet import BinaryNet
from experiments.recipes.cifar import QUANTIZERS
from experiments.recipes.methods import (
    ESTIMATORS,
    LayerOrder,
    Method,
    estimator_of,
    layerwise_schedule,
)

RULES = ab.Rules([(r"(.*/)?kernel", ab.Binary()), (r".*", None)])
BINARYNET = [*(f"conv{i}" for i in range(6)), "dense0", "dense1", "head"]


def test_every_method_has_an_estimator() -> None:
    assert ESTIMATORS.keys() == {*typing.get_args(Method)}
    for method in typing.get_args(Method):
        if method != "ab_compensated":
            assert estimator_of(method, 8.0) is ESTIMATORS[method]


def test_the_cap_is_that_of_the_compensation() -> None:
    w, alpha = jnp.asarray([[0.3], [-0.7]]), 0.9
    for cap, factor in ((1.0, 0.1), (4.0, 0.4), (20.0, 1.0)):
        estimator = estimator_of("ab_compensated", cap)
        gradient = jax.grad(lambda w, f=estimator: f(w, ab.Binary(), alpha).sum())(w)
        np.testing.assert_allclose(gradient, factor, rtol=1e-5)
    with pytest.raises(ValueError, match=r"--cap=0.5 is below 1"):
        estimator_of("ab", 0.5)


def test_binary_with_a_scale_for_each_bit_by_name() -> None:
    for bits in (1, 2, 3, 4):
        assert QUANTIZERS[f"least_squares_binary{bits}"] == ab.LeastSquaresBinary(bits=bits)


class Middle(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(nn.Conv(2, (1, 1), name="inner")(x))


class Upwards(nn.Module):
    """Calls its layers against the alphabet, one of them within another module."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(2, (1, 1), name="z")(x)
        x = Middle(name="m")(x)
        return nn.Dense(3, name="a")(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("order", typing.get_args(LayerOrder))
@pytest.mark.parametrize(
    ("model", "layers"),
    [(BinaryNet(num_classes=3, width=1 / 32), BINARYNET), (Upwards(), ["z", "m/inner", "a"])],
    ids=["BinaryNet", "Upwards"],
)
def test_layers_follow_the_calls(model: Any, layers: list[str], order: LayerOrder) -> None:
    n = len(layers)
    schedule = layerwise_schedule(
        model,
        (8, 8, 1),
        RULES,
        order=order,
        ramp="linear",
        start=0.1,
        stop=1.0,
        steps=100 * n,
    )
    in_order = layers if order == "forward" else layers[::-1]
    for i, layer in enumerate(in_order):
        # Each has a window of 90 steps, from 10 n on.
        middle = 10 * n + 90 * i + 45
        alphas = [float(schedule(middle)(f"{other}/kernel")) for other in in_order]
        np.testing.assert_allclose(alphas, [1.0] * i + [0.5] + [0.0] * (n - i - 1), atol=1e-6)
        assert float(schedule(100 * n)(f"{layer}/kernel")) == 1.0


@pytest.mark.parametrize(
    ("name", "axes"), [("int4_absmax", (0, 1, 2)), ("int4_tensor_absmax", (0, 1, 2, 3))]
)
def test_scales_at_the_largest_magnitude_of_a_channel_or_the_tensor(
    name: str, axes: tuple[int, ...], rng: np.random.Generator
) -> None:
    w = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    quantized = QUANTIZERS[name].quantize(jnp.asarray(w))
    largest = np.abs(w).max(axes, keepdims=True)
    np.testing.assert_allclose(quantized.scale, largest / 7, rtol=1e-6)
