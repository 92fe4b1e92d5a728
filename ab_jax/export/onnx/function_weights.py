"""Quantized weights of a function as they lie in an ONNX file.

Codes of at most 2 bits are packed: 8 of 1 bit, 5 ternary ones, 4 of 2 bits to a byte. Others of at
most 4 bits are stored in 4 bits, the rest in 8. (ONNX has types of 2 bits since opset 25; behind
`DequantizeLinear` ONNX Runtime 1.32 computes another product of them.)

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


_HIGHEST = 127  # of int8
# How many digits of a base fit into a byte.
_DIGITS = {2: 8, 3: 5, 4: 4}


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

    def room(self) -> np.ndarray:
        """By how much the codes of each channel, axis 0, may be multiplied: int32 powers of 2."""
        codes = np.abs(self.weight.codes.astype(np.int32)).reshape(len(self.weight.codes), -1)
        largest = np.maximum(codes.max(axis=1, initial=0), 1)
        return (2 ** np.floor(np.log2(_HIGHEST / largest))).astype(np.int32)

    def written(
        self, file: FunctionFile, *, channels: int | None, fused: bool, finer: bool = False
    ) -> str:
        """The name of the values.

        Args:
          file: where to.
          channels: where they meet codes, the axis of the channels of their product: kernels of
            integers take int8 with a scale for each of these, or one for all.
          fused: whether they stand behind DequantizeLinear where they meet floats.
          finer: whether the codes of each channel, axis 0, take all the `room` there is: the same
            values of smaller units, in which a bias is counted.
        """
        weight = self.weight
        if weight.dtype == np.float32 and len(self.scales) == 1:
            axis, size = self._block()
            if channels is not None:
                if not size and (axis == channels or self.scales[0].size == 1):
                    return self._dequantized(file, channels, 0, as_int8=True, finer=finer)
            elif fused and axis is not None:
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

    def _dequantized(
        self, file: FunctionFile, axis: int, size: int, as_int8: bool, finer: bool = False
    ) -> str:
        """Behind DequantizeLinear, with arrays of its own.

        ONNX Runtime turns int8 into uint8, zero points too, and fails where these are left out of
        one of two weights, or shared by them.
        """
        (scale,), zero = self.scales, self.zero_point
        zero = np.zeros(scale.shape, np.int8) if zero is None else zero
        if not size:  # one scale, or one a channel
            shape = (scale.size,) if scale.size > 1 else ()
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        name = self.weight.path
        if as_int8 or not self.is_int4 or self.weight.bits <= 2:
            stored = self._codes(file)
            if finer and (self.room() > 1).any():
                scale, zero = (np.broadcast_to(a, self.room().shape) for a in (scale, zero))
                scale = scale / self.room().astype(scale.dtype)
                whole = file.cast(stored, np.int8, np.int32)
                whole = file.op(
                    "Mul", whole, self.room().reshape(-1, *(1,) * (self.weight.codes.ndim - 1))
                )
                stored = file.cast(whole, np.int32, np.int8)
            zeros = file.own_array(f"{name}/zero_point", zero)
        else:
            stored = file.int4_array(f"{name}/codes", self.weight.codes)
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
        if bits == 2:
            stored, lowest = self._unpacked(file, digits, 4), 0
        else:
            lowest, name = 2 ** (bits - 1), f"{self.weight.path}/codes"
            stored = file.whole_numbers(name, (digits - lowest).astype(np.int8), int4=bits <= 4)
        left = file.op("Cast", stored, to=_type_of(self.scales[0]))
        left = file.op("Add", left, np.asarray(lowest, kind))
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
        """Whether the codes, and the zero points, are stored in 4 bits."""
        arrays = (self.weight.codes, self.zero_point)
        fit = all(a is None or (a.size and a.min() >= -8 and a.max() <= 7) for a in arrays)
        return self.weight.bits <= 4 and fit

    def _codes(self, file: FunctionFile) -> str:
        """The name of the codes as int8."""
        codes, bits = self.weight.codes, self.weight.bits
        if bits > 2:
            return file.whole_numbers(f"{self.weight.path}/codes", codes, int4=self.is_int4)
        lowest, step, base = -2, 1, 4
        if bits == 1:
            lowest, step, base = -1, 2, 2
        elif codes.size and codes.min() >= -1:
            lowest, base = -1, 3
        digits = self._unpacked(file, (codes - lowest) // step, base)
        unit = np.int32(step)
        found = file.op("Add", file.op("Mul", digits, unit), np.int32(lowest))
        return file.op("Cast", found, to=TensorProto.INT8)

    def _unpacked(self, file: FunctionFile, digits: np.ndarray, base: int) -> str:
        """The name of digits, int32, that are packed in the file, the lowest of a byte first."""
        count = _DIGITS[base]
        flat = np.zeros(-(-digits.size // count) * count, np.int64)
        flat[: digits.size] = digits.reshape(-1)
        powers = base ** np.arange(count)
        data = (flat.reshape(-1, count) @ powers).astype(np.uint8)
        packed = file.array(f"{self.weight.path}/packed", data)
        found = file.op("Cast", packed, to=TensorProto.INT32)
        found = file.op("Div", file.op("Unsqueeze", found, np.array([1])), powers.astype(np.int32))
        found = file.op("Reshape", file.op("Mod", found, np.int32(base)), np.array([-1]))
        found = file.slice(found, 0, 0, digits.size)
        return file.op("Reshape", found, np.array(digits.shape, np.int64))

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
