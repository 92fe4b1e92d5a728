"""Operations that move entries, written into an ONNX file of a function."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FAR, FunctionFile, orderable
from ab_jax.export.traced import Operation, Shape, Size
from ab_jax.export.traced.carrying import NotCarriedError, closed


def _reshape(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    if operation.primitive == "reshape" and operation.params["dimensions"] is not None:
        raise NotCarriedError("with an order of axes of its own")
    return file.reshape(file.name(x), x.shape, operation.outputs[0].shape)


def _transpose(file: FunctionFile, operation: Operation) -> str:
    return file.transpose(file.name(operation.inputs[0]), operation.params["permutation"])


def _broadcast(file: FunctionFile, operation: Operation) -> str:
    x = operation.inputs[0]
    shape = operation.outputs[0].shape
    places = operation.params["broadcast_dimensions"]
    middle: list[Any] = [1] * len(shape)
    for place, size in zip(places, x.shape, strict=True):
        middle[place] = size
    return expanded(file, file.reshape(file.name(x), x.shape, tuple(middle)), middle, shape)


def expanded(file: FunctionFile, x: str, before: Sequence[Any], after: Shape) -> str:
    """The name of an array with its axes of size 1 repeated."""
    return x if tuple(before) == tuple(after) else file.op("Expand", x, file.shape(after))


def _rev(file: FunctionFile, operation: Operation) -> str:
    axes = np.array(operation.params["dimensions"], np.int64)
    if not axes.size:
        return file.name(operation.inputs[0])
    back = np.full_like(axes, -1)
    return file.op(
        "Slice", file.name(operation.inputs[0]), back, np.full_like(axes, -FAR), axes, back
    )


def _slice(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    starts, ends = operation.params["start_indices"], operation.params["limit_indices"]
    steps = operation.params["strides"] or (1,) * len(starts)
    cut = [
        i for i, size in enumerate(x.shape) if (starts[i], steps[i]) != (0, 1) or ends[i] != size
    ]
    if not cut:
        return file.name(x)
    parts = [file.shape([part[i] for i in cut]) for part in (starts, ends)]
    axes, strides = np.array(cut, np.int64), np.array([steps[i] for i in cut], np.int64)
    return file.op("Slice", file.name(x), *parts, axes, strides)


def _concatenate(file: FunctionFile, operation: Operation) -> str:
    names = [file.name(x) for x in operation.inputs]
    return file.op("Concat", *names, axis=operation.params["dimension"])


def _stack(file: FunctionFile, operation: Operation) -> str:
    axis = operation.params["axis"]
    names = [file.op("Unsqueeze", file.name(x), np.array([axis])) for x in operation.inputs]
    return file.op("Concat", *names, axis=axis)


def _split(file: FunctionFile, operation: Operation) -> list[str]:
    (x,) = operation.inputs
    sizes, axis = operation.params["sizes"], operation.params["axis"]
    found, start = [], 0
    if not any(isinstance(size, Size) for size in sizes):
        whole = np.array(sizes, np.int64)
        return file.ops("Split", file.name(x), whole, count=len(sizes), axis=axis)
    for size in sizes:
        found.append(file.slice(file.name(x), axis, start, start + size))
        start += size
    return found


def _unstack(file: FunctionFile, operation: Operation) -> list[str]:
    (x,) = operation.inputs
    axis = operation.params["axis"]
    parts = file.ops(
        "Split",
        file.name(x),
        count=len(operation.outputs),
        axis=axis,
        num_outputs=len(operation.outputs),
    )
    return [file.op("Squeeze", part, np.array([axis])) for part in parts]


def _tile(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    reps = operation.params["reps"]
    return file.op("Tile", file.name(x), file.shape(reps))


def _iota(file: FunctionFile, operation: Operation) -> str:
    shape, axis = operation.outputs[0].shape, operation.params["dimension"]
    counted = file.op("Range", np.int64(0), file.scalar(shape[axis]), np.int64(1))
    counted = file.cast(counted, np.int64, operation.outputs[0].dtype)
    middle = [size if i == axis else 1 for i, size in enumerate(shape)]
    return expanded(file, file.reshape(counted, (shape[axis],), tuple(middle)), middle, shape)


def _pad(file: FunctionFile, operation: Operation) -> str:
    x, value = operation.inputs
    kind = orderable(x.dtype)
    name = file.cast(file.name(x), x.dtype, kind)
    around = file.cast(file.name(value), value.dtype, kind)
    padded, _ = padded_with(file, name, x.shape, operation.params["padding_config"], around)
    return file.cast(padded, kind, x.dtype)


def padded_with(
    file: FunctionFile, x: str, shape: Shape, config: Sequence[Sequence[Any]], value: str
) -> tuple[str, Shape]:
    """The name of an array with a value around and between its entries, and its shape.

    Args:
      file: where to.
      x: the array.
      shape: of `x`.
      config: for each axis how many before, behind and between; before and behind they may be
        negative, and cut off.
      value: a scalar.
    """
    for axis, (_, _, between) in enumerate(config):
        if between:
            x, shape = _spread(file, x, shape, axis, between, value)
    amounts = [[max(closed(e), 0) for e in ends[:2]] for ends in config]
    if any(map(any, amounts)):
        ends = [a for a, _ in amounts] + [b for _, b in amounts]
        x = file.op("Pad", x, np.array(ends, np.int64), value)
    shape = tuple(s + a + b for s, (a, b) in zip(shape, amounts, strict=True))
    for axis, (before, behind, _) in enumerate(config):
        if before < 0 or behind < 0:
            start, cut = max(-before, 0), min(behind, 0)
            x = file.slice(x, axis, start, cut or FAR)
            shape = (*shape[:axis], shape[axis] - start + cut, *shape[axis + 1 :])
    return x, shape


def _spread(
    file: FunctionFile, x: str, shape: Shape, axis: int, between: int, value: str
) -> tuple[str, Shape]:
    """Values between entries along an axis: a row of them behind each entry, the last cut off."""
    x = file.op("Unsqueeze", x, np.array([axis + 1]))
    ends = [0] * (2 * len(shape) + 2)
    ends[-(len(shape) - axis)] = between
    x = file.op("Pad", x, np.array(ends, np.int64), value)
    longer = shape[axis] * (between + 1)
    wide = (*shape[:axis], longer, *shape[axis + 1 :])
    x = file.reshape(x, (*shape[: axis + 1], between + 1, *shape[axis + 1 :]), wide)
    x = file.slice(x, axis, 0, -between)
    return x, (*shape[:axis], longer - between, *shape[axis + 1 :])


def _size(file: FunctionFile, operation: Operation) -> str:
    return file.scalar(operation.params["size"], operation.outputs[0].dtype)


LAYOUTS: dict[str, Write] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "rev": _rev,
    "slice": _slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "split": _split,
    "unstack": _unstack,
    "tile": _tile,
    "iota": _iota,
    "pad": _pad,
    "size": _size,
}
