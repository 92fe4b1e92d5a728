"""EfficientNet-Lite0: EfficientNet (arXiv 1905.11946) without what integer hardware is slow at.

No squeeze-and-excitation, and ReLU6 in place of swish, as its authors have it for phones:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite

Its blocks are the inverted bottlenecks of MobileNet v2 (arXiv 1801.04381). They end without an
activation, so that the inputs of `expand` and of `top` have both signs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ab_jax.activations import Activation, relu6
from ab_jax.models.convolution import convolution
from ab_jax.products import mark

_STEM_FEATURES = 32
_TOP_FEATURES = 1280
_EPSILON = 1e-3
# Of each stage: blocks, the stride of the first, and of each block window, expansion and features.
_STAGES = (
    (1, 1, 3, 1, 16),
    (2, 2, 3, 6, 24),
    (2, 2, 5, 6, 40),
    (3, 2, 3, 6, 80),
    (3, 1, 5, 6, 112),
    (4, 2, 5, 6, 192),
    (1, 1, 3, 6, 320),
)
_FIRST_STRIDED = 1  # the stage that does not stride for images of 32 pixels


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 for images of any size; `head` follows the average over all positions.

    Its collections are `params` (kernels, batch-norm scales and biases, the head's bias) and
    `batch_stats`. The defaults are the published network. Dropout before the head, and blocks
    that are left out at random while training, are not in it.

    The inputs of all convolutions and of the head are marked (`ab_jax.products.mark`), so that
    `ab_jax.linen.WithQuantizedInputs` finds them under the paths of the kernels.

    Attributes:
      num_classes: number of logits.
      width: multiplies the number of features of every layer but the head (1: 16 to 1280).
      stem: the image size that the strides are made for. 224: as published; 64: the stem does
        not stride; 32: neither does the first block that would.
      activation: a function of the pre-activation and alpha (`ab_jax.activations`).
      conv: makes a convolution, with the arguments of `nn.Conv`.
      norm: makes a normalization, with the arguments of `nn.BatchNorm`.
      dtype: what convolutions and products compute in; parameters, statistics and logits are
        float32.
      norm_dtype: what norms give out, whatever they take in; they compute in float32. None: dtype.
      axis_name: the mapped axis over which batch statistics are synchronous, if any.
      axis_index_groups: groups of indices of that axis that have statistics of their own; None: one
        group of all.
      batch_stats_momentum: share of the old running statistics that an update keeps.
      cpu_convolutions: compute convolutions as `ab_jax.models.convolution` has it; None: on CPU.
    """

    num_classes: int = 1000
    width: float = 1.0
    stem: int = 224
    activation: Activation = relu6
    conv: Callable[..., Any] = nn.Conv
    norm: Callable[..., Any] = nn.BatchNorm
    dtype: DTypeLike = jnp.float32
    norm_dtype: DTypeLike | None = None
    axis_name: str | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    batch_stats_momentum: float = 0.9
    cpu_convolutions: bool | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool, alpha: ArrayLike = 1.0) -> Array:
        """Logits, float32 [batch, num_classes], of images [batch, height, width, channels].

        Args:
          images: normalized floating-point images.
          train: use the statistics of the batch and update the running ones; else use those.
          alpha: passed on to the activation.

        Raises:
          ValueError: no batch of images, or a `stem` that there is not.
        """
        if images.ndim != 4:
            raise ValueError(
                f"EfficientNetLite takes images [batch, height, width, channels], not "
                f"{images.shape}"
            )
        if self.stem not in (224, 64, 32):
            raise ValueError(f"stem is the image size 224, 64 or 32, not {self.stem}")
        conv = partial(
            self.conv,
            padding="SAME",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            conv_general_dilated=convolution(self.cpu_convolutions),
        )
        norm = partial(
            self.norm,
            use_running_average=not train,
            momentum=self.batch_stats_momentum,
            epsilon=_EPSILON,
            dtype=self.norm_dtype or self.dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )

        def normed(
            module: nn.Module, layer: str, x: Array, features: int, window: int = 1, **fields: Any
        ) -> Array:
            """A convolution of the module, whose input is marked, and the norm that follows it."""
            x = conv(features, (window, window), name=layer, **fields)(_marked(module, layer, x))
            return norm(name=f"{layer}_norm")(x)

        x = images.astype(self.dtype)
        strides = 2 if self.stem == 224 else 1
        x = normed(self, "stem", x, self._scaled(_STEM_FEATURES), 3, strides=strides)
        x = self.activation(x, alpha)
        number = 0
        for stage, (blocks, stride, window, expansion, features) in enumerate(_STAGES):
            if self.stem == 32 and stage == _FIRST_STRIDED:
                stride = 1
            for first in (True, *[False] * (blocks - 1)):
                x = _Block(
                    features=self._scaled(features),
                    stride=stride if first else 1,
                    window=window,
                    expansion=expansion,
                    normed=normed,
                    activation=self.activation,
                    name=f"block{number}",
                )(x, alpha)
                number += 1
        x = self.activation(normed(self, "top", x, self._scaled(_TOP_FEATURES)), alpha)
        x = _marked(self, "head", x.mean((1, 2)))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        return logits.astype(jnp.float32)

    def _scaled(self, features: int) -> int:
        return max(1, round(features * self.width))


class _Block(nn.Module):
    """An inverted bottleneck: 1x1 to more features, a depthwise convolution, 1x1 to few again.

    Each is normed; the last one is not activated. The block's input is added where it has the
    shape of what the block gives out.
    """

    features: int
    stride: int
    window: int
    expansion: int
    normed: Callable[..., Array]
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, alpha: ArrayLike) -> Array:
        given = x
        inner = self.expansion * x.shape[-1]
        if self.expansion > 1:
            x = self.activation(self.normed(self, "expand", x, inner), alpha)
        x = self.normed(
            self,
            "depthwise",
            x,
            inner,
            self.window,
            strides=self.stride,
            feature_group_count=inner,
        )
        x = self.normed(self, "project", self.activation(x, alpha), self.features)
        residual = self.stride == 1 and given.shape[-1] == self.features
        return x + given if residual else x


def _marked(module: nn.Module, layer: str, x: Array) -> Array:
    return mark(x, "/".join((*module.path, layer, "kernel")))
