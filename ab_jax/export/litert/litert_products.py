"""Matrix products and quantized inputs, written into a LiteRT file of a function."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.flatbuffer import Scales
from ab_jax.export.litert.litert_elementwise import Write, each
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_integers import activation_scales
from ab_jax.export.litert.litert_layers import Layer, write_layer
from ab_jax.export.litert.litert_tensors import Tensor, computed_in
from ab_jax.export.traced import Codes, Constant, Operand, Operation, Shape, Value
from ab_jax.export.traced.carrying import NotCarriedError

_MOST_AXES = 5  # of BATCH_MATMUL


def _dot(file: LitertFile, operation: Operation) -> Tensor | None:
    left, right = operation.inputs
    contracted, batch = operation.params["dimension_numbers"]
    if computed_in(operation.outputs[0].dtype) != np.float32:
        raise NotCarriedError(f"of {left.dtype} to {operation.outputs[0].dtype}")
    if not batch[0] and isinstance(left, Value) != isinstance(right, Value):
        _with_weight(file, operation, int(isinstance(left, Value)))
        return None
    return _product(file, operation, contracted, batch)


def _with_weight(file: LitertFile, operation: Operation, side: int) -> None:
    """FULLY_CONNECTED, which keeps the axes of its input but the last."""
    x, weight = operation.inputs[1 - side], operation.inputs[side]
    assert not isinstance(weight, Value)
    summed, of_weight = (operation.params["dimension_numbers"][0][i] for i in (1 - side, side))
    rows, columns = others(x, summed), others(weight, of_weight)
    kept = [x.shape[i] for i in rows]
    free = [weight.shape[i] for i in columns]
    count, features = math.prod(weight.shape[i] for i in of_weight), math.prod(free)
    wide: Shape = (*(kept or (1,)), count)

    def matrix(w: np.ndarray) -> np.ndarray:
        return w.transpose(*of_weight, *columns).reshape(count, features)

    def arranged(tensor: Tensor) -> Tensor:
        return file.reshape(file.transpose(tensor, [*rows, *summed]), wide)

    def call(inputs: Sequence[Tensor], scales: Scales | None, activation: int) -> Tensor:
        keeps = len(wide) > 2
        options = schema.FullyConnectedOptionsT(
            fusedActivationFunction=activation, keepNumDims=keeps
        )
        version = 5 if keeps else 1
        if scales is not None:
            kernel = inputs[1].scales
            by_channel = kernel is not None and len(kernel.scale) > 1
            version = max(version, 12 if by_channel else 4)
        dtype = np.float32 if scales is None else np.int8
        return file.op(
            "FULLY_CONNECTED",
            *inputs,
            shape=(*wide[:-1], features),
            dtype=dtype,
            scales=scales,
            options=options,
            version=version,
        )

    def back(tensor: Tensor) -> Tensor:
        tensor = file.reshape(tensor, (*kept, *free))
        if side:
            return tensor
        count = len(kept)
        axes = [*range(count, count + len(free)), *range(count)]
        return file.transpose(tensor, axes)

    write_layer(file, Layer(operation, x, arranged, moved(weight, matrix), (1, 0), call, back))


def moved(weight: Codes | Constant, move: Any) -> Codes | Constant:
    """A weight with its entries elsewhere."""
    if isinstance(weight, Codes):
        return weight.moved(move)
    return Constant(np.ascontiguousarray(move(np.asarray(weight.array))), weight.path)


def others(x: Operand, *taken: Sequence[int]) -> list[int]:
    """The axes of an operand that are not among these."""
    return [i for i in range(len(x.shape)) if not any(i in axes for axes in taken)]


def _product(
    file: LitertFile,
    operation: Operation,
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
) -> Tensor:
    """BATCH_MATMUL."""
    left, right = operation.inputs
    rows, columns = (
        others(x, b, c) for x, b, c in zip((left, right), batch, contracted, strict=True)
    )
    batched: Shape = tuple(left.shape[i] for i in batch[0])
    height, width = (
        math.prod((x.shape[i] for i in axes), start=1)
        for x, axes in ((left, rows), (right, columns))
    )
    summed = math.prod((left.shape[i] for i in contracted[0]), start=1)
    front = batched if len(batched) + 2 <= _MOST_AXES else (math.prod(batched, start=1),)

    def arranged(x: Operand, axes: Sequence[int], shape: Shape) -> Tensor:
        tensor = file.cast(file.tensor(x), np.float32)
        return file.reshape(file.transpose(tensor, axes), (*front, *shape))

    turned = [*batch[1], *columns, *contracted[1]]
    adjoint = turned == sorted(turned)
    a = arranged(left, [*batch[0], *rows, *contracted[0]], (height, summed))
    if adjoint:
        b = arranged(right, turned, (width, summed))
    else:
        b = arranged(right, [*batch[1], *contracted[1], *columns], (summed, width))
    options = schema.BatchMatMulOptionsT(adjX=False, adjY=adjoint)
    result = file.op("BATCH_MATMUL", a, b, shape=(*front, height, width), options=options)
    result = file.reshape(result, operation.outputs[0].shape)
    return file.cast(result, operation.outputs[0].dtype)


def _quantize(file: LitertFile, operation: Operation) -> None:
    """Codes that saturate at 127, ours at the top; what is below our lowest is clipped before."""
    scales = activation_scales(operation)
    if scales is None:
        raise NotCarriedError("by a range that depends on inputs, or by several")
    x = file.cast(file.tensor(operation.inputs[0]), np.float32)
    lowest = operation.params["quantizer"].levels[0]
    if lowest < 0:
        # The quotient of this number and the scale is off by its last bit at most.
        end = (lowest * scales.scale).astype(np.float32).reshape(())
        x = each(file, "MAXIMUM", x, end)
    elif scales.zero_point[0] > -128:
        x = file.op("RELU", x)
    codes = file.op(
        "QUANTIZE", x, dtype=np.int8, scales=scales, version=1, name=file.code_names[operation]
    )
    file.codes[operation.outputs[0]] = codes


def _quantize_tokens(file: LitertFile, operation: Operation) -> Tensor:
    """By the scale of each token, in floats: there is no operator of that kind."""
    (value,) = operation.inputs
    highest = 2 ** (operation.params["quantizer"].bits - 1) - 1
    x = file.cast(file.tensor(value), np.float32)
    axes = np.array(operation.params["axes"], np.int32)
    shape = tuple(1 if i in axes else size for i, size in enumerate(x.shape))
    options = schema.ReducerOptionsT(keepDims=True)
    limit = file.op("REDUCE_MAX", file.op("ABS", x), axes, shape=shape, options=options)
    tiny = np.float32(np.finfo(np.float32).tiny * 2**10)
    none = each(file, "LESS", limit, tiny, dtype=np.bool_)
    limit = each(file, "SELECT_V2", none, np.float32(1), limit, dtype=np.float32)
    codes = file.op("ROUND", each(file, "MUL", x, each(file, "DIV", np.float32(highest), limit)))
    scale = each(file, "MUL", limit, np.float32(1 / highest))
    return file.cast(each(file, "MUL", codes, scale), value.dtype)


PRODUCTS: dict[str, Write] = {
    "dot_general": _dot,
    "quantize": _quantize,
    "quantize_tokens": _quantize_tokens,
}
