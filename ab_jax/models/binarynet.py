"""The VGG-like network of BinaryConnect (arXiv 1511.00363) and BinaryNet (arXiv 1602.02830).

2x(128C3) - MP2 - 2x(256C3) - MP2 - 2x(512C3) - MP2 - 2x1024FC - 10, batch norm after each layer,
the output included. It stores full-precision weights: `ab_jax.blend` binarizes them in the loss.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ab_jax.activations import Activation, relu
from ab_jax.linen import InputQuantizer, keep_input

_CONV_FEATURES = (128, 128, 256, 256, 512, 512)
_DENSE_FEATURES = (1024, 1024)


class BinaryNet(nn.Module):
    """BinaryNet for square images whose size is a multiple of 8.

    Its collections are `params` (kernels, batch-norm scales and biases) and `batch_stats`.

    Attributes:
      num_classes: number of logits.
      width: multiplies the number of features of every hidden layer (1: 128 to 512 and 1024).
      activation: a function of the pre-activation and alpha (`ab_jax.activations`): `relu` for
        1-bit weights only, `sign` for 1-bit weights and activations.
      quantize_input: called on the input of every layer.
        By default it marks it, for `ab_jax.linen.WithQuantizedInputs`.
      dtype: what convolutions and products compute in; parameters, statistics and logits are
        float32.
      norm_dtype: what norms between layers give out; they compute in float32 all the same. The
        last one gives the logits.
      axis_name: the mapped axis over which batch statistics are synchronous, if any.
      axis_index_groups: groups of indices of that axis that have statistics of their own; None: one
        group of all.
      batch_stats_momentum: share of the old running statistics that an update keeps.
    """

    num_classes: int = 10
    width: float = 1.0
    activation: Activation = relu
    quantize_input: InputQuantizer = keep_input
    dtype: DTypeLike = jnp.float32
    norm_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    batch_stats_momentum: float = 0.9

    @nn.compact
    def __call__(self, images: Array, *, train: bool, alpha: ArrayLike = 1.0) -> Array:
        """Logits, float32 [batch, num_classes], of images [batch, size, size, channels].

        Args:
          images: normalized floating-point images.
          train: use the statistics of the batch and update the running ones; else use those.
          alpha: passed on to the activation and to `quantize_input`.

        Raises:
          ValueError: images that are not square or whose size is no multiple of 8.
        """
        if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[1] % 8:
            raise ValueError(
                f"BinaryNet takes square images [batch, size, size, channels] with a size that is "
                f"a multiple of 8, not shape {images.shape}. Resize them (--image_size)."
            )
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.batch_stats_momentum,
            epsilon=1e-5,
            dtype=self.norm_dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        x = images.astype(self.dtype)
        for i, features in enumerate(_CONV_FEATURES):
            x = self.quantize_input(self, f"conv{i}", x, alpha)
            x = nn.Conv(
                self._scaled(features), (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{i}"
            )(x)
            if i % 2:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = self.activation(norm(name=f"conv{i}_norm")(x), alpha)
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(_DENSE_FEATURES):
            x = self.quantize_input(self, f"dense{i}", x, alpha)
            x = nn.Dense(
                self._scaled(features), use_bias=False, dtype=self.dtype, name=f"dense{i}"
            )(x)
            x = self.activation(norm(name=f"dense{i}_norm")(x), alpha)
        x = self.quantize_input(self, "head", x, alpha)
        x = nn.Dense(self.num_classes, use_bias=False, dtype=self.dtype, name="head")(x)
        return norm(name="head_norm", dtype=jnp.float32)(x)

    def _scaled(self, features: int) -> int:
        return max(1, round(features * self.width))
