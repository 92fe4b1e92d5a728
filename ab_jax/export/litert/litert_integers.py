"""What LiteRT's operators are given of our layers: codes in their layout, scales, integer biases.

An integer layer of LiteRT sums `codes * (input codes - zero point)` and an int32 bias, and rounds
`sum * (input scale * weight scale / output scale)` to int8, which saturates. A bias is a whole
number of the sum's units, which codes of few bits make coarse: their channels are multiplied by a
power of two, and the scales divided by it, which changes no weight and leaves smaller units.
"""

from typing import NamedTuple

import numpy as np

from ab_jax.export.graph.operations import Convolution, Dense, Quantize, Weights
from ab_jax.export.litert.flatbuffer import Scales
from ab_jax.quantizers import Quantized

_HIGHEST = 127  # of int8; weights do not use -128, which fast kernels cannot take
_SMALLEST = np.finfo(np.float32).tiny
_ROOM = 2**30  # for a sum, half of int32
_LARGEST_MULTIPLIER = 256  # of a sum; XNNPACK refuses what is not below it
_UNNOTICED = 2**-10  # of a code: what a channel's weights may do in all, and be left out
_BIAS_UNITS = 2**20  # of the bias of a channel without weights, whose scale is free


class Integers(NamedTuple):
    """A layer in integers.

    Attributes:
      codes: int8, the shape of the kernel, zero point 0: ours times a power of two by channel.
      scale: float32 [channels out], positive.
      bias: int32 [channels out], of scale `input scale * scale`.
      bias_scale: float32 [channels out].
    """

    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    bias_scale: np.ndarray


def activation_scales(quantize: Quantize) -> Scales:
    """Of int8 codes, whose highest, 127, is our highest one: they saturate where ours do.

    Unsigned codes of 8 bits have zero point -128, those of 4 bits 112. Below, whatever is
    negative must have been clipped, unless the lowest code is -128.
    """
    scale = np.asarray(quantize.quantizer.scale(quantize.limit)).reshape(1)
    return Scales(scale, np.array([_HIGHEST - quantize.quantizer.levels[1]]))


def weight_scales(name: str, weights: Quantized) -> Scales:
    """Scales and zero points of a kernel: one each, or one a channel out.

    A scale of 0, of a channel that batch norm multiplies by 0, becomes the smallest one, 1.2e-38,
    since LiteRT's must be positive.

    Raises:
      ValueError: other blocks of weights have scales of their own; names the layer.
    """
    shape = weights.scale.shape
    if any(size != 1 for size in shape[:-1]) or shape[-1] not in (1, weights.codes.shape[-1]):
        raise ValueError(
            f"{name} has scales of shape {list(shape)}, and LiteRT has one a tensor or one an "
            f"output channel. Quantize with axis=-1 or None, and without group_size."
        )
    scale = np.maximum(np.asarray(weights.scale, np.float32).reshape(-1), _SMALLEST)
    zero_point = np.zeros(scale.shape, np.int64)
    if weights.zero_point is not None:
        zero_point += np.asarray(weights.zero_point).reshape(-1)
    return Scales(scale, zero_point)


def integers(name: str, layer: Convolution | Dense, x: Quantize, y: Quantize) -> Integers | None:
    """The layer from codes of `x` to codes of `y`, or None where int8 kernels cannot compute it.

    They cannot where weights have no codes, or zero points that leave int8 once they are
    subtracted (affine ones of 8 bits), or where a sum might leave int32. A channel without a scale,
    or whose bias leaves its weights no room while they could not change a code, has codes 0.

    Args:
      name: of the layer.
      layer: with or without codes.
      x: what made the codes it takes.
      y: what makes codes of what it gives.
    """
    if not isinstance(layer.kernel, Quantized):
        return None
    scales = weight_scales(name, layer.kernel)
    codes = np.asarray(layer.kernel.codes).astype(np.int64) - scales.zero_point
    if np.abs(codes).max() > _HIGHEST:
        return None
    channels, others = codes.shape[-1], tuple(range(codes.ndim - 1))
    # float64 from here on: products and quotients of float32 that are rounded but once.
    scale = np.broadcast_to(scales.scale.astype(np.float64), channels)
    bias = np.zeros(channels) if layer.bias is None else np.asarray(layer.bias, np.float64)
    of_x, of_y = (float(activation_scales(of).scale[0]) for of in (x, y))

    sums = np.abs(codes).sum(others) * x.quantizer.levels[1]
    most = sums + np.abs(bias) / (of_x * scale)
    idle = (most >= _ROOM) & (sums * of_x * scale / of_y < _UNNOTICED)
    codes[..., idle] = 0
    free = np.where(bias == 0, 1.0, np.abs(bias) / of_x / _BIAS_UNITS)
    scale = np.where(idle, np.maximum(free, _SMALLEST), scale)
    most = np.maximum(np.where(idle, _BIAS_UNITS, most), 1)

    room = np.minimum(_HIGHEST / np.maximum(np.abs(codes).max(others), 1), _ROOM / most)
    finer = 2 ** np.floor(np.log2(np.maximum(room, 1)))
    codes = codes * finer.astype(np.int64)
    scale, most = scale / finer, most * finer
    # A scale below the normal numbers would be refused; a sum of that scale is no sum at all.
    scale = np.maximum(scale, _SMALLEST).astype(np.float32)
    multiplier = of_x * scale.astype(np.float64) / of_y
    # Kernels shift a sum to the left first where the multiplier is above 1.
    if (most * np.maximum(multiplier, 1)).max() > _ROOM or multiplier.max() >= _LARGEST_MULTIPLIER:
        return None
    return Integers(
        codes.astype(np.int8),
        scale,
        np.rint(bias / (of_x * scale.astype(np.float64))).astype(np.int32),
        np.maximum(of_x * scale, _SMALLEST).astype(np.float32),
    )


def is_depthwise(layer: Convolution | Dense) -> bool:
    """Whether each channel is convolved by itself, for which LiteRT has an operator of its own."""
    return isinstance(layer, Convolution) and layer.groups > 1 and _channels(layer.kernel) == 1


def in_layout(layer: Convolution | Dense, kernel: np.ndarray) -> np.ndarray:
    """A kernel in LiteRT's layout.

    [channels out, height, width, channels in], [1, height, width, channels out] of depthwise
    convolutions, [features out, features in] of dense layers.
    """
    if isinstance(layer, Dense):
        return kernel.T
    return kernel.transpose((2, 0, 1, 3) if is_depthwise(layer) else (3, 0, 1, 2))


def channel_axis(layer: Convolution | Dense) -> int:
    """Where the channels out are in that layout."""
    return 3 if is_depthwise(layer) else 0


def _channels(kernel: Weights) -> int:
    return (kernel.codes if isinstance(kernel, Quantized) else kernel).shape[-2]


def width(codes: np.ndarray) -> int:
    """The bits, 2, 4 or 8, in which these codes can be stored."""
    lowest, highest = int(codes.min()), int(codes.max())
    return next(b for b in (2, 4, 8) if -(2 ** (b - 1)) <= lowest and highest < 2 ** (b - 1))
