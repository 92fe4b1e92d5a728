"""The shifted form against XLA's grouped convolution: values, gradients, dtypes, refusals."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ab_jax.models.depthwise import shifted_depthwise_conv

CASES = [
    # image shape, window, strides, padding
    ((2, 8, 8, 5), (3, 3), (1, 1), "SAME"),
    ((2, 8, 8, 5), (3, 3), (2, 2), "SAME"),
    ((1, 9, 6, 3), (3, 3), (2, 1), [(1, 1), (1, 1)]),
    ((1, 9, 8, 3), (5, 5), (1, 1), "SAME"),
    ((1, 8, 7, 3), (5, 5), (2, 2), "SAME"),
    ((3, 7, 11, 1), (5, 2), (3, 2), [(0, 2), (3, 1)]),
    ((2, 8, 7, 4), (2, 4), (2, 3), "SAME_LOWER"),
    ((2, 6, 6, 4), (3, 3), (1, 1), "VALID"),
    ((2, 6, 6, 4), (3, 3), (2, 2), [(-1, 0), (2, -1)]),  # negative padding crops
    ((2, 12, 3), (4,), (2,), "SAME"),  # one spatial axis
    ((1, 4, 5, 6, 2), (3, 2, 1), (2, 1, 1), "SAME"),  # three
    ((2, 2, 2, 3), (3, 3), (1, 1), "VALID"),  # a window that does not fit: nothing comes out
]


def flax_dimensions(rank: int) -> lax.ConvDimensionNumbers:
    spatial = tuple(range(1, rank - 1))
    images = (0, rank - 1, *spatial)
    return lax.ConvDimensionNumbers(images, (rank - 1, rank - 2, *range(rank - 2)), images)


def arguments(images: Any, kernel: Any, strides: Any, padding: Any) -> dict[str, Any]:
    """As `nn.Conv` passes them."""
    return {
        "lhs": images,
        "rhs": kernel,
        "window_strides": strides,
        "padding": padding,
        "lhs_dilation": (1,) * len(strides),
        "rhs_dilation": (1,) * len(strides),
        "dimension_numbers": flax_dimensions(images.ndim),
        "feature_group_count": images.shape[-1],
    }


@pytest.mark.long
@pytest.mark.parametrize(("shape", "window", "strides", "padding"), CASES)
def test_equals_the_grouped_convolution(
    rng: np.random.Generator, shape: Any, window: Any, strides: Any, padding: Any
) -> None:
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*window, 1, shape[-1])), jnp.float32)

    def convolve(function: Any, images: jax.Array, kernel: jax.Array) -> jax.Array:
        return function(**arguments(images, kernel, strides, padding))

    plain = partial(convolve, lax.conv_general_dilated)
    direction = jnp.asarray(rng.normal(size=jax.eval_shape(plain, images, kernel).shape))

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(function: Any) -> Any:
        value, pull = jax.vjp(partial(convolve, function), images, kernel)
        return value, *pull(direction.astype(value.dtype))

    expected = value_and_gradients(lax.conv_general_dilated)
    for ours, theirs in zip(value_and_gradients(shifted_depthwise_conv), expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("of_images", "of_kernel"), [(P("x"), P()), (P(), P("x")), (P("x"), P("x"))], ids=str
)
def test_gradients_on_many_devices_are_those_on_one(
    rng: np.random.Generator, devices: list[jax.Device], of_images: P, of_kernel: P
) -> None:
    """A share has the gradient of its device's loss, what all devices have that of the sum."""
    n = 4
    images = jnp.asarray(rng.normal(size=(2 * n, 6, 6, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3 * n if of_kernel else 3, 3, 1, 5)), jnp.float32)

    def loss(function: Any, images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(function(**arguments(images, kernel, (2, 2), "SAME"))))

    def on_one(images: jax.Array, kernel: jax.Array) -> Any:
        def shares(x: jax.Array, spec: P) -> list[jax.Array]:
            return jnp.split(x, n) if spec else [x] * n

        pairs = zip(shares(images, of_images), shares(kernel, of_kernel), strict=True)
        return sum(loss(lax.conv_general_dilated, *pair) for pair in pairs)

    on_many = jax.shard_map(
        jax.grad(partial(loss, shifted_depthwise_conv), (0, 1)),
        mesh=Mesh(np.array(devices[:n]), ("x",)),
        in_specs=(of_images, of_kernel),
        out_specs=(of_images, of_kernel),
    )
    expected = jax.jit(jax.grad(on_one, (0, 1)))(images, kernel)
    for ours, theirs in zip(jax.jit(on_many)(images, kernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_bfloat16_rounds_once(rng: np.random.Generator) -> None:
    images = jnp.asarray(rng.normal(size=(2, 8, 8, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 16)), jnp.bfloat16)
    exact = lax.conv_general_dilated(
        **arguments(images.astype(jnp.float32), kernel.astype(jnp.float32), (2, 2), "SAME")
    )
    found = shifted_depthwise_conv(**arguments(images, kernel, (2, 2), "SAME"))
    assert found.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 digits, and what the order of the sum makes of 0.
    found = np.asarray(found.astype(jnp.float32))
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-5)


@pytest.mark.long
def test_in_a_flax_convolution(rng: np.random.Generator, key: jax.Array) -> None:
    images = jnp.asarray(rng.normal(size=(2, 9, 9, 6)), jnp.float32)
    conv = partial(nn.Conv, 6, (3, 3), 2, feature_group_count=6)
    plain, shifted = conv(), conv(conv_general_dilated=shifted_depthwise_conv)
    variables = plain.init(key, images)
    found, expected = shifted.apply(variables, images), plain.apply(variables, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_group_count": 1}, "one filter for each of the 4 channels"),
        ({"rhs": jnp.zeros((3, 3, 1, 8))}, r"kernel of shape \(3, 3, 1, 8\) in 4 groups"),
        ({"rhs_dilation": (2, 1)}, r"kernel_dilation=\(2, 1\)"),
        ({"lhs_dilation": (1, 2)}, r"input_dilation=\(1, 2\)"),
        ({"batch_group_count": 2}, "batch_group_count=1, not 2"),
        ({"dimension_numbers": None}, "channels last"),
    ],
)
def test_what_it_is_not_for_is_refused(change: dict[str, Any], message: str) -> None:
    given = arguments(jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4)), (1, 1), "SAME")
    with pytest.raises(ValueError, match=message) as error:
        shifted_depthwise_conv(**{**given, **change})
    assert "Leave conv_general_dilated out" in str(error.value)
