"""The residual block of ResNet v1 and v2, basic and bottleneck."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ab_jax.activations import Activation
from ab_jax.linen import InputQuantizer
from ab_jax.models.convolution import Padding, lax_padding


class Block(nn.Module):
    """`x + f(x)`, where f is two or three convolutions and x may have to change its shape.

    Version 1 (arXiv 1512.03385, figure 2) norms what each convolution gives and has an activation
    after the sum; version 2 (arXiv 1603.05027, figure 4e) has norm and activation before each
    convolution and leaves the sum as it is.

    Attributes:
      features: of the inner convolutions; a bottleneck gives out 4 times as many.
      stride: of the block.
      bottleneck: 1x1, 3x3 and 1x1, else two 3x3.
      version: 1 or 2.
      strided_conv: which convolution of a bottleneck strides; of two 3x3 it is the first.
      shortcut: a 1x1 convolution or zeros where the number of features changes. Where it does not,
        the shortcut is x itself, every `stride`-th position of it.
      conv_bias: which convolutions have a bias: "none", "all" or "unnormalized".
      padding: of the 3x3.
      conv: makes a convolution, with the arguments of `nn.Conv`.
      norm: makes a normalization.
      activation: a function of the pre-activation and alpha.
      quantize_input: called on the input of every convolution.
        By default it marks it, for `ab_jax.linen.WithQuantizedInputs`.
    """

    features: int
    stride: int
    bottleneck: bool
    version: Literal[1, 2]
    strided_conv: Literal["first", "3x3"]
    shortcut: Literal["projection", "pad"]
    conv_bias: Literal["none", "all", "unnormalized"]
    padding: Padding
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    activation: Activation
    quantize_input: InputQuantizer

    @nn.compact
    def __call__(self, x: Array, alpha: ArrayLike) -> Array:
        """The sum, [batch, height / stride, width / stride, features], of x [batch, ...]."""
        windows = (1, 3, 1) if self.bottleneck else (3, 3)
        strided = windows.index(3) if self.strided_conv == "3x3" else 0
        last = len(windows) - 1
        given_out = self.features * (4 if self.bottleneck else 1)

        y = x
        if self.version == 2:
            y = self.activation(self.norm(name="input_norm")(x), alpha)
        shortcut = self._shortcut(x, y, given_out, alpha)
        for i, window in enumerate(windows):
            normalized = self.version == 1 or i < last
            y = self._conv(
                f"conv{i}",
                y,
                alpha,
                features=given_out if i == last else self.features,
                window=window,
                stride=self.stride if i == strided else 1,
                normalized=normalized,
            )
            if normalized:
                y = self.norm(name=f"conv{i}_norm")(y)
            if i < last:
                y = self.activation(y, alpha)
        y += shortcut
        return self.activation(y, alpha) if self.version == 1 else y

    def _shortcut(self, x: Array, activated: Array, features: int, alpha: ArrayLike) -> Array:
        """x in the shape of the block's output; v2 projects what the first convolution sees."""
        if x.shape[-1] == features or self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            return jnp.pad(x, [(0, 0)] * 3 + [(0, features - x.shape[-1])])
        normalized = self.version == 1
        x = self._conv(
            "shortcut",
            activated,
            alpha,
            features=features,
            window=1,
            stride=self.stride,
            normalized=normalized,
        )
        return self.norm(name="shortcut_norm")(x) if normalized else x

    def _conv(
        self,
        name: str,
        x: Array,
        alpha: ArrayLike,
        *,
        features: int,
        window: int,
        stride: int,
        normalized: bool,
    ) -> Array:
        """A convolution of x; `normalized`: a norm directly follows."""
        x = self.quantize_input(self, name, x, alpha)
        return self.conv(
            features,
            (window, window),
            stride,
            padding=lax_padding(self.padding, window),
            use_bias=self.conv_bias == "all"
            or (self.conv_bias == "unnormalized" and not normalized),
            name=name,
        )(x)
