"""ResNet v1 (arXiv 1512.03385) and v2 (arXiv 1603.05027), for ImageNet and for CIFAR.

The papers leave room, and the published weights fill it differently: where a stage strides, which
convolutions have a bias, how images are padded. A `Variant` holds these choices; `KERAS_V1`,
`KERAS_V2`, `TORCHVISION` and `TIMM_V2` are those of the weights one finds.

    resnet50()                      # v1 as in torchvision and timm
    resnet50(variant=KERAS_V2)
    resnet20(num_classes=10)        # CIFAR, 3x3 stem, shortcuts without parameters
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from ab_jax.activations import Activation, relu
from ab_jax.linen import InputQuantizer, keep_input
from ab_jax.models.convolution import Padding, convolution, lax_padding
from ab_jax.models.residual import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What published ResNets differ in. No published one starts its last norms at 0, nor do these.

    Attributes:
      version: 1, norm and activation after each convolution; 2, before it.
      strided_conv: which convolution of a bottleneck strides, the "first" (1x1, as in the first
        paper) or the "3x3" (more accurate, more multiply-adds).
      strided_block: which block of a stage strides. "first": that of every stage but stage 0, as
        in the papers; "last": that of every stage but the last, which leaves the network's
        output size as it is.
      shortcut: where the number of features changes, a 1x1 convolution ("projection") or zeros
        for the new features ("pad", option A of the first paper).
      conv_bias: "none", "all", or "unnormalized": where no norm directly follows.
      epsilon: added to the variance by the norms.
      padding: of strided convolutions, "same" (TensorFlow) or "symmetric" (PyTorch, Keras).
      pool_padding: what surrounds the input of the stem's max pooling. 0 differs from -inf
        where inputs may be negative, in v2.
    """

    version: Literal[1, 2] = 1
    strided_conv: Literal["first", "3x3"] = "3x3"
    strided_block: Literal["first", "last"] = "first"
    shortcut: Literal["projection", "pad"] = "projection"
    conv_bias: Literal["none", "all", "unnormalized"] = "none"
    epsilon: float = 1e-5
    padding: Padding = "symmetric"
    pool_padding: float = -jnp.inf

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} of a ResNet is one of {known}, not {value!r}")


_CHOICES: dict[str, tuple[Any, ...]] = {
    "version": (1, 2),
    "strided_conv": ("first", "3x3"),
    "strided_block": ("first", "last"),
    "shortcut": ("projection", "pad"),
    "conv_bias": ("none", "all", "unnormalized"),
    "padding": ("same", "symmetric"),
}

#: torchvision's and timm's v1 (resnet50).
TORCHVISION = Variant()
#: timm's v2 (resnetv2_50).
TIMM_V2 = Variant(version=2)
#: Keras applications' v1 (ResNet50).
KERAS_V1 = Variant(strided_conv="first", conv_bias="all", epsilon=1.001e-5, pool_padding=0.0)
#: Keras applications' v2 (ResNet50V2).
KERAS_V2 = Variant(
    version=2,
    strided_block="last",
    conv_bias="unnormalized",
    epsilon=1.001e-5,
    pool_padding=0.0,
)
#: The CIFAR networks of the first paper's section 4.2.
CIFAR = Variant(shortcut="pad")


class ResNet(nn.Module):
    """A residual network for images of any size; `head` follows the average over all positions.

    Its collections are `params` and `batch_stats`. Blocks are named `stage0_block0` and on, their
    layers `conv0`, `conv1`, (`conv2`,) `shortcut`; `X_norm` directly follows the layer `X`. The
    norms of v2 that follow no convolution are a block's `input_norm` and, at the end,
    `output_norm`.

    Attributes:
      stage_sizes: number of blocks of each stage.
      features: of stage 0's inner convolutions and of the stem; each stage doubles them.
      bottleneck: blocks of 1x1, 3x3 and 1x1 with 4 times the features at their end, else of two
        3x3.
      variant: what published networks differ in.
      num_classes: number of logits.
      width: multiplies the number of features of every layer but the head.
      stem: the image size that the strides are made for. 224: 7x7 with stride 2 and a max
        pooling, as published for ImageNet; 64: 3x3 with stride 2; 32: 3x3, as for CIFAR.
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
      cpu_convolutions: compute convolutions as `ab_jax.models.convolution` has it; None: on CPU.
    """

    stage_sizes: tuple[int, ...]
    features: int = 64
    bottleneck: bool = True
    variant: Variant = TORCHVISION
    num_classes: int = 1000
    width: float = 1.0
    stem: int = 224
    activation: Activation = relu
    quantize_input: InputQuantizer = keep_input
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
          alpha: passed on to the activation and to `quantize_input`.

        Raises:
          ValueError: no batch of images, or a `stem` that there is not.
        """
        if images.ndim != 4:
            raise ValueError(
                f"ResNet takes images [batch, height, width, channels], not {images.shape}"
            )
        variant = self.variant
        conv = partial(
            self.conv,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            conv_general_dilated=convolution(self.cpu_convolutions),
        )
        norm = partial(
            self.norm,
            use_running_average=not train,
            momentum=self.batch_stats_momentum,
            epsilon=variant.epsilon,
            dtype=self.norm_dtype or self.dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        x = self._stem(images.astype(self.dtype), alpha, conv, norm)
        for name, stage, stride in self.blocks():
            x = Block(
                features=self._scaled(self.features * 2**stage),
                stride=stride,
                bottleneck=self.bottleneck,
                version=variant.version,
                strided_conv=variant.strided_conv,
                shortcut=variant.shortcut,
                conv_bias=variant.conv_bias,
                padding=variant.padding,
                conv=conv,
                norm=norm,
                activation=self.activation,
                quantize_input=self.quantize_input,
                name=name,
            )(x, alpha)
        if variant.version == 2:
            x = self.activation(norm(name="output_norm")(x), alpha)
        x = self.quantize_input(self, "head", x.mean((1, 2)), alpha)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        return logits.astype(jnp.float32)

    def _stem(
        self, x: Array, alpha: ArrayLike, conv: Callable[..., Any], norm: Callable[..., Any]
    ) -> Array:
        """What comes before stage 0. In v2 the norm and the activation are those of the block."""
        if self.stem not in (224, 64, 32):
            raise ValueError(f"stem is the image size 224, 64 or 32, not {self.stem}")
        variant = self.variant
        window = 7 if self.stem == 224 else 3
        normalized = variant.version == 1
        x = self.quantize_input(self, "stem", x, alpha)
        x = conv(
            self._scaled(self.features),
            (window, window),
            1 if self.stem == 32 else 2,
            padding=lax_padding(variant.padding, window),
            use_bias=variant.conv_bias == "all"
            or (variant.conv_bias == "unnormalized" and not normalized),
            name="stem",
        )(x)
        if normalized:
            x = self.activation(norm(name="stem_norm")(x), alpha)
        if self.stem == 224:
            x = _max_pool(x, lax_padding(variant.padding, 3), variant.pool_padding)
        return x

    def blocks(self) -> list[tuple[str, int, int]]:
        """Name, stage and stride of each block."""
        blocks = []
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                if self.variant.strided_block == "first":
                    strides = block == 0 and stage > 0
                else:
                    strides = block == size - 1 and stage < len(self.stage_sizes) - 1
                blocks.append((f"stage{stage}_block{block}", stage, 2 if strides else 1))
        return blocks

    def _scaled(self, features: int) -> int:
        return max(1, round(features * self.width))


def _max_pool(x: Array, padding: Any, value: float) -> Array:
    """Maxima of 3x3 windows, 2 apart, of an input that `value` surrounds."""
    if value != -jnp.inf:
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), padding)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=value)
        padding = "VALID"
    return nn.max_pool(x, (3, 3), (2, 2), padding)


def resnet50(**fields: Any) -> ResNet:
    """ResNet-50 for ImageNet, v1 or v2 by its `variant`; `fields` are those of `ResNet`."""
    return ResNet(stage_sizes=(3, 4, 6, 3), **fields)


def resnet20(**fields: Any) -> ResNet:
    """ResNet-20 for CIFAR: 10 classes and `CIFAR` unless `fields` say otherwise."""
    return _cifar_resnet(3, fields)


def resnet56(**fields: Any) -> ResNet:
    """ResNet-56 for CIFAR: 10 classes and `CIFAR` unless `fields` say otherwise."""
    return _cifar_resnet(9, fields)


def _cifar_resnet(blocks: int, fields: dict[str, Any]) -> ResNet:
    """The network of 6 * `blocks` + 2 layers of the first paper's section 4.2."""
    defaults = {"variant": CIFAR, "num_classes": 10, "stem": 32}
    return ResNet(
        stage_sizes=(blocks,) * 3, features=16, bottleneck=False, **{**defaults, **fields}
    )
