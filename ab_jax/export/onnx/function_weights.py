"""Quantized weights of a function as they lie in an ONNX file.

Codes of at most 4 bits are stored in 4 bits, others in 8. (Types of 2 bits came with opset 25, and
ONNX Runtime 1.32 computes another product behind `DequantizeLinear` of them.)

They become numbers in one of two ways. As `Cast` and `Mul`, which ONNX Runtime computes when it
loads the file: the values are those of JAX whatever the scales are by. Or by `DequantizeLinear`,
which stays in front of its product; ONNX Runtime then makes one kernel of both, in integers where
the other operand is codes too.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from ab_jax.export.traced import Codes

if TYPE_CHECKING:
    from ab_jax.export.onnx.function_file import FunctionFile


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight with its scales by block.

    Attributes:
      weight: its codes.
      scales: each of as many axes as the codes; an entry serves a block of neighbours.
      zero_point: int8 of the shape of a scale, or None.
    """

    weight: Codes
    scales: tuple[np.ndarray, ...]
    zero_point: np.ndarray | None

    def written(self, file: FunctionFile, *, channels: int | None) -> str:
        """The name of the values.

        Args:
          file: where to.
          channels: where they meet codes, the axis of the channels of their product: kernels of
            integers take int8 with a scale for each of these, or one for all.
        """
        weight = self.weight
        if weight.dtype == np.float32 and len(self.scales) == 1:
            axis, size = self._block()
            if channels is not None:
                if not size and (axis == channels or self.scales[0].size == 1):
                    return self._dequantized(file, channels, 0, as_int8=True)
            elif file.fused and axis is not None:
                return self._dequantized(file, axis, size, as_int8=False)
        values = self._signed_sum(file) if len(self.scales) > 1 else self._multiplied(file)
        return file.cast(values, self.scales[0].dtype, weight.dtype)

    def _block(self) -> tuple[int | None, int]:
        """The axis along which scales differ, and the size of a block; no axis: not so simple.

        With blocks of 0 there is one entry a channel, or, at axis 0, one for all.
        """
        shape, counts = self.weight.shape, self.scales[0].shape
        varied = [i for i, count in enumerate(counts) if count > 1]
        whole = [i for i in varied if counts[i] == shape[i]]
        if len(varied) <= 1 and varied == whole:
            return (varied or [0])[0], 0
        blocked = [i for i in varied if counts[i] < shape[i]]
        if len(blocked) == 1 and len(whole) == len(shape) - 1:
            return blocked[0], shape[blocked[0]] // counts[blocked[0]]
        return None, 0

    def _dequantized(self, file: FunctionFile, axis: int, size: int, as_int8: bool) -> str:
        """Behind DequantizeLinear, with arrays of its own.

        ONNX Runtime turns int8 into uint8, zero points too, and fails where these are left out of
        one of two weights, or shared by them.
        """
        (scale,), zero = self.scales, self.zero_point
        zero = np.zeros(scale.shape, np.int8) if zero is None else zero
        if not size:  # one scale, or one a channel
            shape = (scale.size,) if scale.size > 1 else ()
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        name, codes = self.weight.path, self.weight.codes
        if as_int8 or not self.is_int4:
            stored = file.whole_numbers(f"{name}/codes", codes, int4=self.is_int4)
            zeros = file.own_array(f"{name}/zero_point", zero)
        else:
            stored = file.int4_array(f"{name}/codes", codes)
            zeros = file.int4_array(f"{name}/zero_point", zero)
        scales = file.own_array(f"{name}/scale", scale)
        options = {"block_size": size} if size else {}
        return file.op("DequantizeLinear", stored, scales, zeros, axis=axis, **options)

    def _multiplied(self, file: FunctionFile) -> str:
        """Codes times scales."""
        (scale,) = self.scales
        values = file.op("Cast", self._codes(file), to=_type_of(scale))
        split, blocks = self._split()
        values = file.reshape(values, self.weight.shape, split)
        if self.zero_point is not None:
            zeros = file.array(f"{self.weight.path}/zero_point", self.zero_point.reshape(blocks))
            values = file.op("Sub", values, file.op("Cast", zeros, to=_type_of(scale)))
        values = file.op(
            "Mul", values, file.array(f"{self.weight.path}/scale", scale.reshape(blocks))
        )
        return file.reshape(values, split, self.weight.shape)

    def _signed_sum(self, file: FunctionFile) -> str:
        """The sum of a code's scales by its binary digits, the highest first."""
        bits, kind = self.weight.bits, self.scales[0].dtype
        digits = (self.weight.codes.astype(np.int32) + (2**bits - 1)) >> 1
        left = file.op(
            "Cast",
            file.array(f"{self.weight.path}/digits", digits.astype(np.uint8)),
            to=_type_of(self.scales[0]),
        )
        split, blocks = self._split()
        left = file.reshape(left, self.weight.shape, split)
        total = ""
        for i, scale in enumerate(self.scales):
            place = np.asarray(2 ** (bits - 1 - i), kind)
            digit = file.op("Floor", file.op("Div", left, place))
            left = file.op("Sub", left, file.op("Mul", digit, place))
            sign = file.op("Sub", file.op("Mul", digit, np.asarray(2, kind)), np.asarray(1, kind))
            term = file.op("Mul", sign, scale.reshape(blocks))
            total = file.op("Add", total, term) if total else term
        return file.reshape(total, split, self.weight.shape)

    @property
    def is_int4(self) -> bool:
        """Whether the codes, and the zero points, can be stored in 4 bits."""
        arrays = (self.weight.codes, self.zero_point)
        return all(a is None or (a.size and a.min() >= -8 and a.max() <= 7) for a in arrays)

    def _codes(self, file: FunctionFile) -> str:
        """The name of the codes as int8."""
        name = f"{self.weight.path}/codes"
        return file.whole_numbers(name, self.weight.codes, int4=self.is_int4)

    def _split(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes in which blocks have an axis of their own: of the codes, and of the scales."""
        split: list[int] = []
        blocks: list[int] = []
        for count, size in zip(self.scales[0].shape, self.weight.shape, strict=True):
            whole = count in (1, size)
            split += [size] if whole else [count, size // count]
            blocks += [count] if whole else [count, 1]
        return tuple(split), tuple(blocks)


def stored(weight: Codes) -> Stored:
    """The weight with as few scales as tell it."""
    arrays = [*weight.scales, *([] if weight.zero_point is None else [weight.zero_point])]
    for axis, size in enumerate(weight.shape):
        if size == 0:
            continue
        for count in (n for n in range(1, size + 1) if size % n == 0):
            firsts = [np.take(a, np.arange(count) * (size // count), axis) for a in arrays]
            if all(
                np.array_equal(np.repeat(first, size // count, axis), a)
                for first, a in zip(firsts, arrays, strict=True)
            ):
                arrays = firsts
                break
    count = len(weight.scales)
    return Stored(weight, tuple(arrays[:count]), arrays[count] if arrays[count:] else None)


def _type_of(array: np.ndarray) -> int:
    return TensorProto.DOUBLE if array.dtype == np.float64 else TensorProto.FLOAT
