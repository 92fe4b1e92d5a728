"""Convolutions in the form that is fastest on CPUs, for `nn.Conv(conv_general_dilated=...)`.

XLA's CPU backend takes several times as long as it need for two kinds of convolution that mobile
and residual networks are made of: depthwise ones, and the kernel gradient of pointwise (1x1) ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ab_jax.models.depthwise import is_channels_last, shifted_depthwise_conv


def convolution(for_cpu: bool | None = None) -> Callable[..., Array]:
    """The function that computes convolutions.

    Args:
      for_cpu: `cpu_conv_general_dilated`, or else `jax.lax.conv_general_dilated`. None: whichever
        suits the default backend.
    """
    if for_cpu is None:
        for_cpu = jax.default_backend() == "cpu"
    return cpu_conv_general_dilated if for_cpu else lax.conv_general_dilated


def cpu_conv_general_dilated(
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
    """`jax.lax.conv_general_dilated`, equal to it but for rounding.

    Depthwise convolutions become shifted multiply-adds, pointwise ones products of matrices, and
    all others stay as they are.

    Args: those of `jax.lax.conv_general_dilated`. Only what is laid out as in `nn.Conv`, with the
      channels last, is rewritten.
    """
    *window, inputs, _ = rhs.shape
    dilation = (*(lhs_dilation or ()), *(rhs_dilation or ()))
    plain = batch_group_count == 1 and all(factor == 1 for factor in dilation)
    if plain and is_channels_last(dimension_numbers, lhs.ndim):
        if feature_group_count > 1 and rhs.shape[-2:] == (1, feature_group_count):
            return shifted_depthwise_conv(
                lhs,
                rhs,
                window_strides,
                padding,
                dimension_numbers=dimension_numbers,
                feature_group_count=feature_group_count,
                preferred_element_type=preferred_element_type,
            )
        unpadded = isinstance(padding, str) or not any(map(any, padding))
        if feature_group_count == 1 and unpadded and all(taps == 1 for taps in window):
            strided = lhs[:, *(slice(None, None, stride) for stride in window_strides)]
            rows = jnp.matmul(
                strided.reshape(-1, inputs),
                rhs.reshape(inputs, -1),
                precision=precision,
                preferred_element_type=preferred_element_type,
            )
            return rows.reshape(*strided.shape[:-1], -1)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )


Padding = Literal["same", "symmetric"]


def lax_padding(padding: Padding, window: int) -> str | Sequence[tuple[int, int]]:
    """The `padding` argument of `nn.Conv` and of pooling, for a square window on images.

    Args:
      padding: "same" as in Keras and TensorFlow, "symmetric" as in PyTorch.
      window: taps along height and along width.

    Raises:
      ValueError: another name.
    """
    if padding == "same":
        return "SAME"
    if padding == "symmetric":
        return [(window // 2, window // 2)] * 2
    raise ValueError(f'padding is "same" or "symmetric", not {padding!r}')
