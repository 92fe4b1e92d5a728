"""Matrix products and convolutions, written into an ONNX file of a function.

Quantized operands stay codes up to their product: they are moved as uint8 and become numbers right
in front of it, where ONNX Runtime makes one kernel of integers of all three.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import (
    FunctionFile,
    QuantizedName,
    computed_in,
)
from ab_jax.export.traced import Codes, Constant, Operand, Operation, Shape, Value
from ab_jax.export.traced.carrying import NotCarriedError


def arranged(
    file: FunctionFile,
    x: Operand,
    axes: Sequence[int],
    shape: Shape,
    kind: np.dtype,
    *,
    channels: int | None = None,
    in_product: bool = False,
) -> str:
    """The name of an operand with its axes in another order, and in another shape then.

    `channels`: where a weight meets codes, the axis of its channels in that shape; `in_product`:
    whether it is the matrix of a product.
    """
    moved = tuple(x.shape[axis] for axis in axes)
    if isinstance(x, Codes):
        closed: Any = shape
        x = x.moved(lambda a: a.transpose(axes).reshape(closed))
        return file.cast(file.weight(x, channels=channels, in_product=in_product), x.dtype, kind)
    if isinstance(x, Constant):
        x = Constant(np.ascontiguousarray(x.array.transpose(axes).reshape(shape)), x.path)
        return file.cast(file.name(x), x.dtype, kind)
    if x in file.quantized:
        found = file.quantized[x]
        codes = file.reshape(file.transpose(found.codes, axes), moved, shape)
        return file.op("DequantizeLinear", codes, found.scale, found.zero_point)
    name = file.cast(file.name(x), x.dtype, kind)
    return file.reshape(file.transpose(name, axes), moved, shape)


def _is_codes(file: FunctionFile, x: Operand) -> bool:
    return isinstance(x, Value) and x in file.quantized


def _dot(file: FunctionFile, operation: Operation) -> str:
    contracted, batch = operation.params["dimension_numbers"]
    left, right = operation.inputs
    if isinstance(right, Value) and not isinstance(left, Value) and not batch[0]:
        # The weight goes to the right, and what was its part of the shape back in front.
        name, shape = _product(file, operation, right, left, contracted[::-1], batch[::-1])
        count = len(right.shape) - len(contracted[1])
        axes = [*range(count, len(shape)), *range(count)]
    else:
        name, shape = _product(file, operation, left, right, contracted, batch)
        axes = list(range(len(shape)))
    return file.transpose(name, axes)


def _product(
    file: FunctionFile,
    operation: Operation,
    left: Operand,
    right: Operand,
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
) -> tuple[str, Shape]:
    """The name of a product, and its shape: axes of the batch, of the left, of the right."""
    result = operation.outputs[0].dtype
    kind = computed_in(np.promote_types(result, np.promote_types(left.dtype, right.dtype)))
    sizes = [
        [[x.shape[i] for i in part] for part in (b, _others(x, b, c), c)]
        for x, b, c in zip((left, right), batch, contracted, strict=True)
    ]
    (batched, rows, summed), (_, columns, _) = sizes
    meets = _is_codes(file, left), _is_codes(file, right)
    # Rows and columns may stay several axes where MatMul takes them so.
    flat = bool(batched) or len(summed) != 1
    in_rows = tuple(rows) if not flat or len(rows) == 1 else (math.prod(rows),)
    shape: Shape = (*batched, *in_rows, math.prod(summed))
    axes = [*batch[0], *_others(left, batch[0], contracted[0]), *contracted[0]]
    # A product of two axes and the sum after it ONNX Runtime would make a Gemm of, which rounds
    # what is added to codes, and takes no codes of weights.
    of_codes = any(meets) or (file.fused and isinstance(right, Codes))
    alone = (of_codes and len(shape) == 2) or not in_rows
    a = arranged(file, left, axes, (1, *shape) if alone else shape, kind)
    shape = (*batched, math.prod(summed), math.prod(columns))
    axes = [*batch[1], *contracted[1], *_others(right, batch[1], contracted[1])]
    channels = len(shape) - 1 if meets[0] and not batched else None
    b = arranged(file, right, axes, shape, kind, channels=channels, in_product=not batched)
    found = file.op("MatMul", a, b)
    found = file.cast(found, kind, result)
    given = (*((1,) if alone else ()), *batched, *in_rows, math.prod(columns))
    wanted = (*batched, *rows, *columns)
    return file.reshape(found, given, wanted), wanted


def _others(x: Operand, *taken: Sequence[int]) -> list[int]:
    return [i for i in range(len(x.shape)) if not any(i in axes for axes in taken)]


def _quantize(file: FunctionFile, operation: Operation) -> str:
    """Codes of an activation, and what they stand for."""
    x = operation.inputs[0]
    name = file.cast(file.name(x), x.dtype, np.float32)
    return add_codes(file, operation.outputs[0], coded(file, operation, name))


def coded(file: FunctionFile, operation: Operation, x: str) -> QuantizedName:
    """The codes that a `quantize` makes of float32 numbers."""
    limit = operation.inputs[1]
    quantizer: Any = operation.params["quantizer"]
    if not isinstance(limit, Constant):
        raise NotCarriedError("by a range that depends on inputs")
    zero_point = np.uint8(128 if quantizer.signed else 0)
    scale = np.asarray(quantizer.scale(limit.array), np.float32)
    scale_name, zero_name = file.constant(scale), file.constant(zero_point)
    codes = file.op("QuantizeLinear", x, scale_name, zero_name)
    ends = [int(zero_point) + level for level in quantizer.levels]
    if ends != [0, 255]:  # of uint8, where QuantizeLinear stops by itself
        codes = file.op("Clip", codes, *(np.uint8(end) for end in ends))
    return QuantizedName(codes, scale_name, zero_name, int(zero_point), scale)


def add_codes(file: FunctionFile, value: Value, codes: QuantizedName) -> str:
    """Make codes known as those of a value; returns the name of their numbers.

    Not by DequantizeLinear: where ONNX Runtime sees that before a layer and QuantizeLinear after
    it, it rounds the layer's float32 weights to 8 bits by itself.
    """
    kind = np.dtype(np.float32)
    if value.dtype == kind:
        file.quantized[value] = codes
    numbers = file.cast(codes.codes, np.uint8, kind)
    if codes.offset:
        numbers = file.op("Sub", numbers, np.float32(codes.offset))
    return file.cast(file.op("Mul", numbers, codes.scale), kind, value.dtype)


def _quantize_tokens(file: FunctionFile, operation: Operation) -> str:
    """By the scale of each token, in floats: there is no operator of that kind."""
    (x,) = operation.inputs
    highest = 2 ** (operation.params["quantizer"].bits - 1) - 1
    kind = np.dtype(np.float32)
    name = file.cast(file.name(x), x.dtype, kind)
    axes = np.array(operation.params["axes"], np.int64)
    limit = file.op("ReduceMax", file.op("Abs", name), axes, keepdims=1)
    tiny = np.float32(np.finfo(np.float32).tiny * 2**10)
    limit = file.op("Where", file.op("Less", limit, tiny), np.float32(1), limit)
    per_unit = file.op("Div", np.float32(highest), limit)
    codes = file.op("Round", file.op("Mul", name, per_unit))
    scale = file.op("Mul", limit, np.float32(1 / highest))
    return file.cast(file.op("Mul", codes, scale), kind, x.dtype)


PRODUCTS: dict[str, Write] = {
    "dot_general": _dot,
    "quantize": _quantize,
    "quantize_tokens": _quantize_tokens,
}
