"""Reductions over windows, such as poolings, written into an ONNX file of a function."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FunctionFile, orderable
from ab_jax.export.onnx.function_layouts import padded_with
from ab_jax.export.traced import Operation, Shape, Size
from ab_jax.export.traced.carrying import NotCarriedError, check_padding

_COMBINED = {
    "reduce_window_sum": "Add",
    "reduce_window_max": "Max",
    "reduce_window_min": "Min",
}
_MOST_AXES = 3
_MOST_PLACES = 64  # of a window whose entries are combined one by one


def _window(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    params = operation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    if any(isinstance(size, Size) for size in (*window, *strides)):
        raise NotCarriedError("with a window whose size is open")
    of_codes = operation.primitive == "reduce_window_max" and x.dtype == np.uint8
    kind = np.dtype(np.uint8) if of_codes else orderable(x.dtype)
    name, shape = file.cast(file.name(x), x.dtype, kind), x.shape
    pads = [tuple(ends) for ends in params["padding"]]
    check_padding(pads)
    factors = params["base_dilation"]
    axes = [i for i, size in enumerate(window) if size != 1 or strides[i] != 1 or any(pads[i])]
    # A window that sees nothing but padding has no largest entry there.
    seeing = all(0 <= end < size for ends, size in zip(pads, window, strict=True) for end in ends)
    dilated = any(d != 1 for d in params["window_dilation"])  # sums of these came later
    pooled = {
        "reduce_window_max": seeing and all(factor == 1 for factor in factors),
        "reduce_window_sum": not dilated,
    }.get(operation.primitive, False)
    pooled = pooled and (kind == np.float32 or of_codes) and 0 < len(axes) <= _MOST_AXES
    config = [(*ends, factor - 1) for ends, factor in zip(pads, factors, strict=True)]
    attributes = pooled and seeing and all(factor == 1 for factor in factors)
    if any(map(any, config)) and not attributes:
        edge = file.constant(kind.type(_neutral(operation.primitive, kind)))
        name, shape = padded_with(file, name, shape, config, edge)
        pads = [(0, 0)] * len(pads)
    if not axes:
        result = name
    elif pooled:
        result = _pool(file, operation, name, shape, axes, pads)
    elif math.prod(window) <= _MOST_PLACES:
        result = _combined(file, operation, name, shape)
    else:
        raise NotCarriedError(f"of {x.dtype} over windows of {list(window)}")
    return file.cast(result, kind, operation.outputs[0].dtype)


def _neutral(primitive: str, kind: np.dtype) -> float:
    if primitive == "reduce_window_sum":
        return 0
    lowest = primitive == "reduce_window_max"
    if np.issubdtype(kind, np.floating):
        return -np.inf if lowest else np.inf
    return np.iinfo(kind).min if lowest else np.iinfo(kind).max


def _pool(
    file: FunctionFile,
    operation: Operation,
    x: str,
    shape: Shape,
    axes: Sequence[int],
    pads: Sequence[tuple[int, int]],
) -> str:
    """By the pooling operators, which want two axes in front of those of the windows."""
    params = operation.params
    rest = [i for i in range(len(shape)) if i not in axes]
    order = [*rest, *axes]
    moved = tuple(shape[i] for i in order)
    front = moved[: len(rest)]
    if len(rest) != 2:
        front = (math.prod(front), 1)
    inner = (*front, *moved[len(rest) :])
    x = file.reshape(file.transpose(x, order), moved, inner)
    window = [params["window_dimensions"][i] for i in axes]
    options = {
        "kernel_shape": window,
        "strides": [params["window_strides"][i] for i in axes],
        "pads": [pads[i][0] for i in axes] + [pads[i][1] for i in axes],
    }
    if operation.primitive == "reduce_window_max":
        dilations = [params["window_dilation"][i] for i in axes]
        x = file.op("MaxPool", x, dilations=dilations, **options)
    else:
        x = file.op("AveragePool", x, count_include_pad=1, **options)
        x = file.op("Mul", x, np.float32(math.prod(window)))
    result = tuple(operation.outputs[0].shape[i] for i in order)
    x = file.reshape(x, (*front, *result[len(rest) :]), result)
    return file.transpose(x, [order.index(i) for i in range(len(order))])


def _combined(file: FunctionFile, operation: Operation, x: str, shape: Shape) -> str:
    """What each place of the window sees, put together place by place."""
    params = operation.params
    strides, dilations = params["window_strides"], params["window_dilation"]
    total = ""
    for place in itertools.product(*map(range, params["window_dimensions"])):
        part = x
        for axis, offset in enumerate(place):
            start = offset * dilations[axis]
            count = operation.outputs[0].shape[axis]
            end = start + (count - 1) * strides[axis] + 1
            if (start, strides[axis]) != (0, 1) or end != shape[axis]:
                part = file.slice(part, axis, start, end, strides[axis])
        total = file.op(_COMBINED[operation.primitive], total, part) if total else part
    return total


WINDOWS: dict[str, Write] = dict.fromkeys(_COMBINED, _window)
