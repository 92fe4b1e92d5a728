"""Depthwise convolution as shifted multiply-adds, for backends whose grouped one is slow.

XLA's CPU backend computes a grouped convolution group by group; the same sum as one multiply-add
a tap of the kernel (nine for 3x3) runs over all channels at once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike


def shifted_depthwise_conv(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """A depthwise `jax.lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=...)`.

    The arguments are those of `jax.lax.conv_general_dilated` as `nn.Conv` passes them.

    Args:
      lhs: images [batch, *spatial, channels], floating point.
      rhs: kernel [*window, 1, channels], floating point.
      window_strides: one a spatial axis.
      padding: "SAME", "SAME_LOWER", "VALID" or (low, high) a spatial axis.
      lhs_dilation: none, or ones.
      rhs_dilation: none, or ones.
      dimension_numbers: those of Flax (channels last), as `jax.lax.ConvDimensionNumbers`.
      feature_group_count: the number of channels.
      batch_group_count: 1.
      precision: without effect, since multiply-adds have one precision.
      preferred_element_type: dtype of the result; `lhs`'s unless given.

    Returns:
      [batch, *output spatial, channels]. Sums run in float32 at least and are rounded once.

    Raises:
      ValueError: what is no depthwise convolution with one filter a channel, or is dilated.
    """
    rank = lhs.ndim
    if feature_group_count != lhs.shape[-1] or rhs.shape[-2:] != (1, feature_group_count):
        _refuse(
            f"one filter for each of the {lhs.shape[-1]} channels, not a kernel of shape "
            f"{rhs.shape} in {feature_group_count} groups"
        )
    if any(factor != 1 for factor in (*(lhs_dilation or ()), *(rhs_dilation or ()))):
        _refuse(f"no dilation, not input_dilation={lhs_dilation}, kernel_dilation={rhs_dilation}")
    if batch_group_count != 1:
        _refuse(f"batch_group_count=1, not {batch_group_count}")
    spatial = tuple(range(1, rank - 1))
    channels_last = (
        (0, rank - 1, *spatial),
        (rank - 1, rank - 2, *(axis - 1 for axis in spatial)),
        (0, rank - 1, *spatial),
    )
    if dimension_numbers is None or tuple(dimension_numbers) != channels_last:
        _refuse(f"channels last, as nn.Conv has them, not dimension_numbers={dimension_numbers}")

    window = rhs.shape[:-2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:-1], window, window_strides, padding)
    no_padding = (0, 0, 0)
    padded = lax.pad(
        lhs,
        jnp.zeros((), lhs.dtype),
        [no_padding, *((low, high, 0) for low, high in padding), no_padding],
    )
    sizes = [
        max(0, (size - taps) // stride + 1)
        for size, taps, stride in zip(padded.shape[1:-1], window, window_strides, strict=True)
    ]
    dtype = preferred_element_type or jnp.result_type(lhs, rhs)
    sum_dtype = jnp.promote_types(dtype, jnp.float32)
    if min(lhs.shape[0], *sizes) == 0:
        return jnp.zeros((lhs.shape[0], *sizes, lhs.shape[-1]), dtype)
    kernel = rhs.reshape(*window, -1).astype(sum_dtype)
    return _multiply_adds(padded, kernel, tuple(window_strides)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_adds(images: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    """The convolution, without padding, of [batch, *spatial, channels] by [*window, channels]."""
    window = kernel.shape[:-1]
    sizes = [
        (size - taps) // stride + 1
        for size, taps, stride in zip(images.shape[1:-1], window, strides, strict=True)
    ]
    total: Any = 0
    for tap in np.ndindex(*window):
        ends = [
            first + (size - 1) * stride + 1
            for first, size, stride in zip(tap, sizes, strides, strict=True)
        ]
        shifted = lax.slice(
            images,
            (0, *tap, 0),
            (images.shape[0], *ends, images.shape[-1]),
            (1, *strides, 1),
        )
        weight = kernel[tap].reshape((1,) * (images.ndim - 1) + (-1,))
        total += shifted.astype(kernel.dtype) * weight
    return total


def _forward(
    images: Array, kernel: Array, strides: tuple[int, ...]
) -> tuple[Array, tuple[Array, Array]]:
    return _multiply_adds(images, kernel, strides), (images, kernel)


def _backward(
    strides: tuple[int, ...], saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    """The gradients; that of the kernel image by image.

    A sum over the whole batch, once a tap, would read the batch from memory nine times; one image
    stays in the cache. On a CPU that is five times faster.
    """
    images, kernel = saved
    plain = _multiply_adds.fun
    _, pull = jax.vjp(lambda images: plain(images, kernel, strides), images)

    def add(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        x, direction = (part[None] for part in image)
        _, pull = jax.vjp(lambda kernel: plain(x, kernel, strides), kernel)
        return total + pull(direction)[0], None

    of_kernel, _ = lax.scan(add, jnp.zeros_like(kernel), (images, cotangent))
    return *pull(cotangent), of_kernel


_multiply_adds.defvjp(_forward, _backward)


def is_faster_here() -> bool:
    """Whether the default backend is one that the shifted form is made for, the CPU."""
    return jax.default_backend() == "cpu"


def _refuse(what: str) -> None:
    raise ValueError(
        f"shifted_depthwise_conv takes {what}. Leave conv_general_dilated out of that nn.Conv: "
        f"XLA's own convolution takes it."
    )
