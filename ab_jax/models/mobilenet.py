"""MobileNet v1 (arXiv 1704.04861): depthwise 3x3 and pointwise 1x1 convolutions in turn.

The same network for smaller images strides later, so that the last blocks keep as many positions
as they can: `stem` is the image size that the strides are made for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ab_jax.activations import Activation, relu6
from ab_jax.linen import InputQuantizer, keep_input
from ab_jax.models.convolution import Padding, convolution, lax_padding

_STEM_FEATURES = 32
# Features and stride of each block: table 1 of the paper, whose last stride of 2 is a misprint.
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
_FIRST_STRIDED = 1  # the block that does not stride for images of 32 pixels


class MobileNet(nn.Module):
    """MobileNet v1 for images of any size; `head` follows the average over all positions.

    Its collections are `params` (kernels, batch-norm scales and biases, the head's bias) and
    `batch_stats`. The defaults are the published network as TensorFlow and Keras have it; timm's
    mobilenetv1_100 is `MobileNet(epsilon=1e-5, padding="symmetric")`. The dropout of 0.001 that
    Keras places before the head is left out.

    Attributes:
      num_classes: number of logits.
      width: multiplies the number of features of every layer but the head (1: 32 to 1024).
      stem: the image size that the strides are made for. 224: as published; 64: the stem does
        not stride; 32: neither does the first block that would.
      activation: a function of the pre-activation and alpha (`ab_jax.activations`).
      quantize_input: called on the input of every convolution and of the head.
        By default it marks it, for `ab_jax.linen.WithQuantizedInputs`.
      conv: makes a convolution, with the arguments of `nn.Conv`.
      norm: makes a normalization, with the arguments of `nn.BatchNorm`.
      dtype: what convolutions and products compute in; parameters, statistics and logits are
        float32.
      norm_dtype: what norms give out, whatever they take in; they compute in float32. None: dtype.
      axis_name: the mapped axis over which batch statistics are synchronous, if any.
      axis_index_groups: groups of indices of that axis that have statistics of their own; None: one
        group of all.
      batch_stats_momentum: share of the old running statistics that an update keeps.
      epsilon: added to the variance by the norms.
      padding: of strided convolutions, "same" (Keras) or "symmetric" (PyTorch).
      cpu_convolutions: compute convolutions as `ab_jax.models.convolution` has it; None: on CPU.
    """

    num_classes: int = 1000
    width: float = 1.0
    stem: int = 224
    activation: Activation = relu6
    quantize_input: InputQuantizer = keep_input
    conv: Callable[..., Any] = nn.Conv
    norm: Callable[..., Any] = nn.BatchNorm
    dtype: DTypeLike = jnp.float32
    norm_dtype: DTypeLike | None = None
    axis_name: str | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    batch_stats_momentum: float = 0.9
    epsilon: float = 1e-3
    padding: Padding = "same"
    cpu_convolutions: bool | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool, alpha: ArrayLike = 1.0) -> Array:
        """Logits, float32 [batch, num_classes], of images [batch, height, width, channels].

        Args:
          images: normalized floating-point images.
          train: use the statistics of the batch and update the running ones; else use those.
          alpha: passed on to the activation and to `quantize_input`.

        Raises:
          ValueError: no batch of images, or a `stem` or `padding` that there is not.
        """
        if images.ndim != 4:
            raise ValueError(
                f"MobileNet takes images [batch, height, width, channels], not {images.shape}"
            )
        stem_stride, *strides = self.strides
        conv = partial(
            self.conv,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            conv_general_dilated=convolution(self.cpu_convolutions),
        )
        norm = partial(
            self.norm,
            use_running_average=not train,
            momentum=self.batch_stats_momentum,
            epsilon=self.epsilon,
            dtype=self.norm_dtype or self.dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )

        x = self.quantize_input(self, "stem", images.astype(self.dtype), alpha)
        x = conv(
            self._scaled(_STEM_FEATURES),
            (3, 3),
            stem_stride,
            padding=lax_padding(self.padding, 3),
            name="stem",
        )(x)
        x = self.activation(norm(name="stem_norm")(x), alpha)
        for i, ((features, _), stride) in enumerate(zip(_BLOCKS, strides, strict=True)):
            x = _Block(
                features=self._scaled(features),
                stride=stride,
                padding=self.padding,
                conv=conv,
                norm=norm,
                activation=self.activation,
                quantize_input=self.quantize_input,
                name=f"block{i}",
            )(x, alpha)
        x = self.quantize_input(self, "head", x.mean((1, 2)), alpha)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        return logits.astype(jnp.float32)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the stem, then of each block.

        Raises:
          ValueError: a `stem` that there is not.
        """
        if self.stem not in (224, 64, 32):
            raise ValueError(f"stem is the image size 224, 64 or 32, not {self.stem}")
        strides = [stride for _, stride in _BLOCKS]
        if self.stem == 32:
            strides[_FIRST_STRIDED] = 1
        return (2 if self.stem == 224 else 1, *strides)

    def _scaled(self, features: int) -> int:
        return max(1, round(features * self.width))


class _Block(nn.Module):
    """A depthwise convolution, which may stride, then a pointwise one; each normed, activated."""

    features: int
    stride: int
    padding: Padding
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    activation: Activation
    quantize_input: InputQuantizer

    @nn.compact
    def __call__(self, x: Array, alpha: ArrayLike) -> Array:
        channels = x.shape[-1]
        x = self.quantize_input(self, "depthwise", x, alpha)
        x = self.conv(
            channels,
            (3, 3),
            self.stride,
            padding=lax_padding(self.padding, 3),
            feature_group_count=channels,
            name="depthwise",
        )(x)
        x = self.activation(self.norm(name="depthwise_norm")(x), alpha)
        x = self.quantize_input(self, "pointwise", x, alpha)
        x = self.conv(self.features, (1, 1), name="pointwise")(x)
        return self.activation(self.norm(name="pointwise_norm")(x), alpha)
