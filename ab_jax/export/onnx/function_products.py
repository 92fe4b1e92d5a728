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
    NotCarriedError,
    QuantizedName,
    computed_in,
)
from ab_jax.export.onnx.function_layouts import padded_with
from ab_jax.export.traced import Codes, Constant, Operand, Operation, Shape, Size, Value

_MOST_AXES = 3  # of images: ONNX Runtime has kernels up to these


def _arranged(
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
    # what is added.
    alone = (any(meets) and len(shape) == 2) or not in_rows
    a = _arranged(file, left, axes, (1, *shape) if alone else shape, kind)
    shape = (*batched, math.prod(summed), math.prod(columns))
    axes = [*batch[1], *contracted[1], *_others(right, batch[1], contracted[1])]
    channels = len(shape) - 1 if meets[0] and not batched else None
    b = _arranged(file, right, axes, shape, kind, channels=channels, in_product=not batched)
    found = file.op("MatMul", a, b)
    found = file.cast(found, kind, result)
    given = (*((1,) if alone else ()), *batched, *in_rows, math.prod(columns))
    wanted = (*batched, *rows, *columns)
    return file.reshape(found, given, wanted), wanted


def _others(x: Operand, *taken: Sequence[int]) -> list[int]:
    return [i for i in range(len(x.shape)) if not any(i in axes for axes in taken)]


def _convolution(file: FunctionFile, operation: Operation) -> str:
    x, kernel = operation.inputs
    params = operation.params
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise NotCarriedError("with groups of the batch")
    if len(x.shape) > _MOST_AXES + 2 or len(x.shape) < 3:
        raise NotCarriedError(f"over {len(x.shape) - 2} axes")
    kind = computed_in(x.dtype)
    if not np.issubdtype(kind, np.floating):
        raise NotCarriedError(f"of {x.dtype}")
    lhs, rhs, out = (tuple(spec) for spec in numbers)
    shape = tuple(x.shape[i] for i in lhs)
    window = tuple(kernel.shape[i] for i in rhs)
    if any(isinstance(size, Size) for size in window):
        raise NotCarriedError("with a kernel whose size is open")
    data = _arranged(file, x, lhs, shape, kind)
    name = _transposed(file, operation, data, kernel, kind)
    if name is None:
        name = _direct(file, operation, data, shape, kernel, kind)
    name = file.transpose(name, [out.index(i) for i in range(len(out))])
    return file.cast(name, kind, operation.outputs[0].dtype)


def _direct(
    file: FunctionFile,
    operation: Operation,
    data: str,
    shape: Shape,
    kernel: Operand,
    kind: np.dtype,
) -> str:
    """A convolution, with zeros put between its inputs where it is one by their dilation."""
    params = operation.params
    rhs = tuple(params["dimension_numbers"].rhs_spec)
    window = tuple(kernel.shape[i] for i in rhs)
    weights = _arranged(file, kernel, rhs, window, kind)
    pads = [tuple(ends) for ends in params["padding"]]
    if any(isinstance(end, Size) for ends in pads for end in ends):
        raise NotCarriedError("with a padding that is open")
    dilated = any(factor != 1 for factor in params["lhs_dilation"])
    if dilated or any(end < 0 for ends in pads for end in ends):
        config = [(0, 0, 0)] * 2 + [
            (*ends, factor - 1) for ends, factor in zip(pads, params["lhs_dilation"], strict=True)
        ]
        data, _ = padded_with(file, data, shape, config, file.constant(kind.type(0)))
        pads = [(0, 0)] * len(pads)
    return file.op(
        "Conv",
        data,
        weights,
        kernel_shape=[kernel.shape[i] for i in rhs[2:]],
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=[start for start, _ in pads] + [end for _, end in pads],
    )


def _transposed(
    file: FunctionFile, operation: Operation, data: str, kernel: Operand, kind: np.dtype
) -> str | None:
    """A convolution of dilated inputs as ConvTranspose, where that has its numbers."""
    params = operation.params
    steps, pads = params["lhs_dilation"], params["padding"]
    if all(step == 1 for step in steps) or isinstance(kernel, Value):
        return None
    if any(n != 1 for n in (*params["window_strides"], *params["rhs_dilation"])):
        return None
    rhs = tuple(params["dimension_numbers"].rhs_spec)
    out, own, *window = (kernel.shape[i] for i in rhs)
    before = [size - 1 - start for size, (start, _) in zip(window, pads, strict=True)]
    behind = [size - 1 - end for size, (_, end) in zip(window, pads, strict=True)]
    more = [max(-end, 0) for end in behind]
    if min(before) < 0 or any(m >= step for m, step in zip(more, steps, strict=True)):
        return None
    groups = params["feature_group_count"]

    def turned(weights: np.ndarray) -> np.ndarray:
        """Its inputs in front, and each place at the other end."""
        weights = np.flip(weights.transpose(rhs), tuple(range(2, len(rhs))))
        weights = weights.reshape(groups, out // groups, own, *window).swapaxes(1, 2)
        return weights.reshape(groups * own, out // groups, *window)

    moved: Operand
    if isinstance(kernel, Codes):
        moved = kernel.moved(turned)
    else:
        moved = Constant(np.ascontiguousarray(turned(np.asarray(kernel.array))), kernel.path)
    return file.op(
        "ConvTranspose",
        data,
        file.cast(file.name(moved), kernel.dtype, kind),
        kernel_shape=window,
        strides=list(steps),
        group=groups,
        pads=before + [max(end, 0) for end in behind],
        output_padding=more,
    )


def _quantize(file: FunctionFile, operation: Operation) -> str:
    """Codes of an activation, and what they stand for."""
    x, limit = operation.inputs
    quantizer: Any = operation.params["quantizer"]
    if not isinstance(limit, Constant):
        raise NotCarriedError("by a range that depends on inputs")
    zero_point = np.uint8(128 if quantizer.signed else 0)
    kind = np.dtype(np.float32)
    names = [
        file.constant(np.asarray(quantizer.scale(limit.array), kind)),
        file.constant(zero_point),
    ]
    codes = file.op("QuantizeLinear", file.cast(file.name(x), x.dtype, kind), *names)
    ends = [int(zero_point) + level for level in quantizer.levels]
    if ends != [0, 255]:  # of uint8, where QuantizeLinear stops by itself
        codes = file.op("Clip", codes, *(np.uint8(end) for end in ends))
    result = operation.outputs[0]
    if result.dtype == kind:
        file.quantized[result] = QuantizedName(codes, *names)
    return file.cast(file.op("DequantizeLinear", codes, *names), kind, result.dtype)


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
    "conv_general_dilated": _convolution,
    "quantize": _quantize,
    "quantize_tokens": _quantize_tokens,
}
