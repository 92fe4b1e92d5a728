"""Convolutions rewritten for CPUs against XLA's own: values, gradients, dtypes, both in layers."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ab_jax.models.convolution import convolution, cpu_conv_general_dilated

pytestmark = pytest.mark.long

# Arguments of `nn.Conv`, and whether the compiled program still holds a convolution.
CASES: list[tuple[dict[str, Any], bool]] = [
    ({"features": 7, "kernel_size": (1, 1)}, False),
    ({"features": 1, "kernel_size": (1, 1), "strides": 2}, False),
    ({"features": 5, "kernel_size": (1, 1), "strides": (3, 1), "padding": "VALID"}, False),
    ({"features": 5, "kernel_size": (1, 1), "padding": ((0, 0), (0, 0))}, False),
    ({"features": 6, "kernel_size": (3, 3), "strides": 2, "feature_group_count": 6}, False),
    # What is neither pointwise nor depthwise, or is more than that, stays a convolution.
    ({"features": 5, "kernel_size": (1, 1), "padding": ((1, 0), (0, 2))}, True),
    ({"features": 5, "kernel_size": (3, 3)}, True),
    ({"features": 5, "kernel_size": (3, 1)}, True),
    ({"features": 4, "kernel_size": (1, 1), "feature_group_count": 2}, True),
    ({"features": 12, "kernel_size": (3, 3), "feature_group_count": 3}, True),
    (
        {"features": 5, "kernel_size": (1, 1), "input_dilation": 2, "padding": ((0, 0), (0, 0))},
        True,
    ),
    (
        {"features": 6, "kernel_size": (3, 3), "feature_group_count": 6, "kernel_dilation": 2},
        True,
    ),
]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("fields", "is_convolution"), CASES)
def test_equals_the_convolution_of_xla(
    rng: np.random.Generator,
    key: jax.Array,
    fields: dict[str, Any],
    is_convolution: bool,
    use_bias: bool,
) -> None:
    images = jnp.asarray(rng.normal(size=(3, 7, 8, 6)), jnp.float32)
    plain = nn.Conv(**fields, use_bias=use_bias)
    ours = plain.clone(conv_general_dilated=cpu_conv_general_dilated)
    variables = plain.init(key, images)
    direction = rng.normal(size=jax.eval_shape(plain.apply, variables, images).shape)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(conv: nn.Conv) -> Any:
        value, pull = jax.vjp(conv.apply, variables, images)
        return value, pull(jnp.asarray(direction, value.dtype))

    expected, found = value_and_gradients(plain), value_and_gradients(ours)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)
    jaxpr = str(jax.make_jaxpr(ours.apply)(variables, images))
    assert ("conv_general_dilated" in jaxpr) == is_convolution


@pytest.mark.parametrize(
    ("images_shape", "kernel_shape", "groups"),
    [
        ((2, 1, 4, 4), (1, 1, 4, 4), 1),  # read as channels last: pointwise, of 4 channels
        ((2, 4, 4, 4), (4, 1, 1, 4), 4),  # read as channels last: depthwise, of 4 channels
    ],
)
@pytest.mark.parametrize("dimension_numbers", [None, ("NCHW", "OIHW", "NCHW")])
def test_images_with_the_channels_first_are_left_to_xla(
    rng: np.random.Generator,
    images_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    groups: int,
    dimension_numbers: Any,
) -> None:
    """JAX's own default layout."""
    images = jnp.asarray(rng.normal(size=images_shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)
    found, expected = (
        convolve(
            images,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=dimension_numbers,
            feature_group_count=groups,
        )
        for convolve in (cpu_conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(found, expected)


def test_bfloat16_products_round_once(rng: np.random.Generator, key: jax.Array) -> None:
    images = jnp.asarray(rng.normal(size=(2, 4, 4, 64)), jnp.bfloat16)
    conv = nn.Conv(16, (1, 1), use_bias=False, dtype=jnp.bfloat16)
    variables = conv.init(key, images)
    found = conv.clone(conv_general_dilated=cpu_conv_general_dilated).apply(variables, images)
    assert found.dtype == jnp.bfloat16
    kernel = np.asarray(variables["params"]["kernel"].astype(jnp.bfloat16), np.float64)[0, 0]
    exact = np.asarray(images, np.float64) @ kernel
    # Half a unit in the last of bfloat16's 8 digits.
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-5)


def test_the_backend_decides_unless_told() -> None:
    assert jax.default_backend() == "cpu"
    assert convolution() is convolution(True) is cpu_conv_general_dilated
    assert convolution(False) is lax.conv_general_dilated
