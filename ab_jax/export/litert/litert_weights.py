"""Quantized weights of a function as they lie in a LiteRT file, and their values.

Codes are int8, or narrower, and become numbers by DEQUANTIZE: that has a scale for each index of
one axis, so that the blocks of a weight that have a scale of their own lie along an axis in the
file. Of codes whose binary digits have scales, the digits are taken off one by one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ab_jax.export.litert.flatbuffer import Scales
from ab_jax.export.traced import Codes

if TYPE_CHECKING:
    from ab_jax.export.litert.litert_file import LitertFile
    from ab_jax.export.litert.litert_tensors import Tensor

_SMALLEST = np.finfo(np.float32).tiny


class Blocks(NamedTuple):
    """Arrays of a weight that are the same within blocks of neighbours.

    Attributes:
      arrays: with an entry a block.
      counts: how many blocks there are along each axis.
    """

    arrays: list[np.ndarray]
    counts: tuple[int, ...]


def in_blocks(weight: Codes) -> Blocks:
    """Scales, and zero points if there are some, with as few entries as tell them."""
    arrays = [*weight.scales, *([] if weight.zero_point is None else [weight.zero_point])]
    counts = []
    for axis, size in enumerate(weight.shape):
        divisors = [n for n in range(1, size + 1) if size % n == 0] or [size]
        for count in divisors:
            step = size // max(count, 1)
            firsts = [a.take(np.arange(count) * step, axis) for a in arrays]
            if all(
                np.array_equal(np.repeat(first, step, axis), a)
                for first, a in zip(firsts, arrays, strict=True)
            ):
                break
        arrays = firsts
        counts.append(count)
    return Blocks(arrays, tuple(counts))


def weight_scales(weight: Codes, axis: int) -> Scales | None:
    """Scales and zero points that are one each, or one for each index of an axis; None: neither.

    A scale of 0, of a channel that batch norm multiplies by 0, becomes the smallest one, 1.2e-38,
    since LiteRT's must be positive.
    """
    blocks = in_blocks(weight)
    fits = all(count == 1 or i == axis for i, count in enumerate(blocks.counts))
    if len(weight.scales) > 1 or not fits or blocks.counts[axis] not in (1, weight.shape[axis]):
        return None
    return _scales(weight, blocks, axis)


def _scales(weight: Codes, blocks: Blocks, axis: int) -> Scales:
    scale = np.maximum(blocks.arrays[0].astype(np.float32).reshape(-1), _SMALLEST)
    zeros = np.zeros(scale.shape, np.int64)
    if weight.zero_point is not None:
        zeros += blocks.arrays[-1].reshape(-1)
    return Scales(scale, zeros, axis)


def weight_values(file: LitertFile, weight: Codes, axis: int = 0, name: str = "") -> Tensor:
    """The values of a weight.

    Args:
      file: where to.
      weight: its codes.
      axis: along which scales may differ, if they do so along one.
      name: of the codes.
    """
    name = name or f"{weight.path}/codes"
    if len(weight.scales) > 1:
        values = _sum_of_digits(file, weight, name)
    else:
        axes = [axis, *range(len(weight.shape))] if weight.shape else []
        fitting = [found for i in axes if (found := weight_scales(weight, i)) is not None]
        if fitting:
            values = dequantized(file, weight.codes, fitting[0], name)
        else:
            values = _by_block(file, weight, name)
    return file.cast(values, weight.dtype)


def dequantized(file: LitertFile, codes: np.ndarray, scales: Scales, name: str) -> Tensor:
    """Codes behind DEQUANTIZE, stored as narrowly as they may be."""
    bits = max(file.narrowest, width(codes))
    stored = file.array(codes, name, scales, bits)
    if stored not in file.dequantized:
        version = {2: 7, 4: 6, 8: 5 if len(scales.scale) > 1 else 2}[bits]
        file.dequantized[stored] = file.op(
            "DEQUANTIZE", stored, dtype=np.float32, version=version, name=f"{name}/values"
        )
    return file.dequantized[stored]


def _by_block(file: LitertFile, weight: Codes, name: str) -> Tensor:
    """Blocks of one scale, one behind the other, which are put in their places then."""
    blocks = in_blocks(weight)
    split: list[int] = []
    for count, size in zip(blocks.counts, weight.shape, strict=True):
        split += [count, size // count]
    front, rest = range(0, len(split), 2), range(1, len(split), 2)
    order = [*front, *rest]
    codes = weight.codes.reshape(split).transpose(order)
    each = [split[i] for i in order]
    codes = codes.reshape(math.prod(each[: len(front)]), -1)
    values = dequantized(file, np.ascontiguousarray(codes), _scales(weight, blocks, 0), name)
    kept = [i for i in order if split[i] > 1]  # axes of size 1 need not be moved
    values = file.reshape(values, tuple(split[i] for i in kept))
    values = file.transpose(values, [kept.index(i) for i in sorted(kept)])
    return file.reshape(values, weight.shape)


def _sum_of_digits(file: LitertFile, weight: Codes, name: str) -> Tensor:
    """The scales of a code, each by the sign of its digit, the highest first.

    Codes are odd: the sign of one is that of its highest digit, and without it the next is left.
    """
    one = Scales(np.ones(1, np.float32), np.zeros(1, np.int64))
    left = dequantized(file, weight.codes, one, name)
    blocks = in_blocks(weight)
    split: list[int] = []
    spread: list[int] = []
    for count, size in zip(blocks.counts, weight.shape, strict=True):
        whole = count in (1, size)
        split += [size] if whole else [count, size // count]
        spread += [count] if whole else [count, 1]
    left = file.reshape(left, tuple(split))
    total = None
    for i, scale in enumerate(blocks.arrays[: len(weight.scales)]):
        sign = file.op("SIGN", left)
        term = file.op("MUL", sign, scale.astype(np.float32).reshape(spread))
        total = term if total is None else file.op("ADD", total, term)
        place = np.float32(2 ** (weight.bits - 1 - i))
        left = file.op("SUB", left, file.op("MUL", sign, place))
    assert total is not None
    return file.reshape(total, weight.shape)


def width(codes: np.ndarray) -> int:
    """The bits, 2, 4 or 8, in which these codes can be stored."""
    if not codes.size:
        return 8
    lowest, highest = int(codes.min()), int(codes.max())
    return next(b for b in (2, 4, 8) if -(2 ** (b - 1)) <= lowest and highest < 2 ** (b - 1))
