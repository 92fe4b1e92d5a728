"""Layers in integers: codes, scales and biases as LiteRT's operators on int8 take them.

An integer layer of LiteRT sums `codes * (input codes - zero point)` and an int32 bias, and rounds
`sum * (input scale * weight scale / output scale)` to int8, which saturates. A bias is a whole
number of the sum's units, which codes of few bits make coarse: their channels are multiplied by a
power of two, and the scales divided by it, which changes no weight and leaves smaller units.
"""

from typing import Any, NamedTuple

import numpy as np

from ab_jax.export.litert.flatbuffer import Scales
from ab_jax.export.litert.litert_weights import weight_scales
from ab_jax.export.traced import Codes, Constant, Operation

_HIGHEST = 127  # of int8; weights do not use -128, which fast kernels cannot take
_SMALLEST = np.finfo(np.float32).tiny
_ROOM = 2**30  # for a sum, half of int32
_LARGEST_MULTIPLIER = 256  # of a sum; XNNPACK refuses what is not below it
_UNNOTICED = 2**-10  # of a code: what a channel's weights may do in all, and be left out
_BIAS_UNITS = 2**20  # of the bias of a channel without weights, whose scale is free


class Integers(NamedTuple):
    """A layer in integers.

    Attributes:
      codes: int8, the shape of the weight, zero point 0: ours times a power of two by channel.
      scale: float32 [channels out], positive.
      bias: int32 [channels out], of scale `input scale * scale`.
      bias_scale: float32 [channels out].
    """

    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    bias_scale: np.ndarray


def activation_scales(quantize: Operation) -> Scales | None:
    """Of int8 codes, whose highest, 127, is our highest one: they saturate where ours do.

    Unsigned codes of 8 bits have zero point -128, those of 4 bits 112. Below, whatever is
    negative must have been clipped, unless the lowest code is -128. None: the range is not one
    number that is known.
    """
    limit = quantize.inputs[1]
    if not isinstance(limit, Constant) or np.size(limit.array) != 1:
        return None
    quantizer: Any = quantize.params["quantizer"]
    scale = np.asarray(quantizer.scale(limit.array), np.float32).reshape(1)
    return Scales(scale, np.array([_HIGHEST - quantizer.levels[1]]))


def integers(weight: Codes, bias: np.ndarray | None, x: Scales, y: Scales) -> Integers | None:
    """A layer from codes of `x` to codes of `y`, or None where int8 kernels cannot compute it.

    They cannot where scales differ within a channel, where weights have zero points that leave
    int8 once they are subtracted (affine ones of 8 bits), or where a sum might leave int32. A
    channel without a scale, or whose bias leaves its weights no room while they could not change a
    code, has codes 0.

    Args:
      weight: with the channels out last.
      bias: [channels out], or None.
      x, y: scales of the codes it takes, and of those it gives.
    """
    channels = weight.shape[-1]
    scales = weight_scales(weight, len(weight.shape) - 1)
    if scales is None or weight.dtype != np.float32:
        return None
    codes = weight.codes.astype(np.int64) - scales.zero_point
    if np.abs(codes).max() > _HIGHEST:
        return None
    others = tuple(range(codes.ndim - 1))
    # float64 from here on: products and quotients of float32 that are rounded but once.
    scale = np.broadcast_to(scales.scale.astype(np.float64), channels)
    bias = np.zeros(channels) if bias is None else bias.reshape(-1).astype(np.float64)
    of_x, of_y = float(x.scale[0]), float(y.scale[0])
    levels = _HIGHEST - int(x.zero_point[0])

    sums = np.abs(codes).sum(others) * levels
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
