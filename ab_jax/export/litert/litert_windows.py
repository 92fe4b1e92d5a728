"""Sums and largest and smallest entries of windows, written into a LiteRT file of a function.

Windows over one or two axes are those of poolings; others are put together place by place.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.litert_convolutions import padding_kind
from ab_jax.export.litert.litert_elementwise import Write, each
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_layouts import padded_with
from ab_jax.export.litert.litert_tensors import Tensor, orderable
from ab_jax.export.traced import Operation, Shape, Size
from ab_jax.export.traced.carrying import NotCarriedError, check_padding

_COMBINED = {
    "reduce_window_max": "MAXIMUM",
    "reduce_window_sum": "ADD",
    "reduce_window_min": "MINIMUM",
}
_MOST_PLACES = 64  # of a window whose entries are combined one by one


def _window(file: LitertFile, operation: Operation) -> Tensor:
    params, name = operation.params, operation.primitive
    tensor = file.tensor(operation.inputs[0])
    is_codes, dtype = tensor.scales is not None, tensor.dtype
    if not is_codes:
        tensor = file.cast(tensor, orderable(dtype))
    window, strides = params["window_dimensions"], params["window_strides"]
    if any(isinstance(size, Size) for size in (*window, *strides)):
        raise NotCarriedError("with a window whose size is open")
    pads = [tuple(ends) for ends in params["padding"]]
    check_padding(pads)
    factors = params["base_dilation"]
    axes = [i for i, size in enumerate(window) if size != 1 or strides[i] != 1]
    plain = all(d == 1 for d in (*params["window_dilation"], *factors))
    fits = tensor.dtype == np.float32 or (is_codes and name == "reduce_window_max")
    pooled = plain and fits and 0 < len(axes) <= 2 and name != "reduce_window_min"
    if is_codes and not pooled:
        raise NotCarriedError("of codes")
    padding = schema.Padding.VALID
    if pooled and name == "reduce_window_max":
        kind = padding_kind(
            [tensor.shape[i] for i in axes],
            [window[i] for i in axes],
            [strides[i] for i in axes],
            [pads[i] for i in axes],
        )
        others = any(any(ends) for i, ends in enumerate(pads) if i not in axes)
        if kind is not None and not others:
            padding, pads = kind, [(0, 0)] * len(pads)
    config = [(*ends, factor - 1) for ends, factor in zip(pads, factors, strict=True)]
    if any(map(any, config)):
        tensor = padded_with(file, tensor, config, _edge(file, name, tensor))
    if pooled:
        return file.cast(_pool(file, operation, tensor, axes, padding), dtype)
    if math.prod(window) > _MOST_PLACES:
        raise NotCarriedError(f"of {dtype} over windows of {list(window)}")
    return file.cast(_combined(file, operation, tensor), operation.outputs[0].dtype)


def _edge(file: LitertFile, name: str, x: Tensor) -> Tensor:
    """What surrounds the entries and changes no result."""
    if x.scales is not None:
        return file.array(np.array([-128], np.int8), scales=x.scales)
    if name == "reduce_window_sum":
        return file.given(x.dtype.type(0))
    lowest = name == "reduce_window_max"
    if x.dtype.kind == "f":
        return file.given(x.dtype.type(-np.inf if lowest else np.inf))
    return file.given(x.dtype.type(np.iinfo(x.dtype).min if lowest else np.iinfo(x.dtype).max))


def _pool(
    file: LitertFile, operation: Operation, x: Tensor, axes: Sequence[int], padding: int
) -> Tensor:
    """By the pooling operators, which have the axes of the windows before the last of four."""
    params, result = operation.params, operation.outputs[0].shape
    rest = [i for i in range(len(result)) if i not in axes]
    last = rest[-1:]
    order = [*rest[:-1], *axes, *last]
    moved = tuple(x.shape[i] for i in order)
    ones: list[Any] = [1] * (2 - len(axes))

    def inner(shape: Shape) -> Shape:
        front = shape[: len(rest) - len(last)]
        batch: Any = front[0] if len(front) == 1 else math.prod(front, start=1)
        middle = shape[len(front) : len(front) + len(axes)]
        return (batch, *ones, *middle, shape[-1] if last else 1)

    x = file.reshape(file.transpose(x, order), inner(moved))
    height, width = (*ones, *(params["window_dimensions"][i] for i in axes))
    down, right = (*ones, *(params["window_strides"][i] for i in axes))
    options = schema.Pool2DOptionsT(
        padding=padding, filterHeight=height, filterWidth=width, strideH=down, strideW=right
    )
    after = tuple(result[i] for i in order)
    largest = operation.primitive == "reduce_window_max"
    code = "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D"
    x = file.op(code, x, shape=inner(after), options=options)
    if not largest:
        x = each(file, "MUL", x, np.float32(height * width))
    return file.transpose(file.reshape(x, after), [order.index(i) for i in range(len(order))])


def _combined(file: LitertFile, operation: Operation, x: Tensor) -> Tensor:
    """What each place of the window sees, put together place by place."""
    params, result = operation.params, operation.outputs[0].shape
    strides, dilations = params["window_strides"], params["window_dilation"]
    total = None
    for place in itertools.product(*map(range, params["window_dimensions"])):
        part = x
        for axis, offset in enumerate(place):
            start, step = offset * dilations[axis], strides[axis]
            part = file.slice(part, axis, start, start + (result[axis] - 1) * step + 1, step)
        code = _COMBINED[operation.primitive]
        total = part if total is None else each(file, code, total, part)
    assert total is not None
    return total


WINDOWS: dict[str, Write] = dict.fromkeys(_COMBINED, _window)
