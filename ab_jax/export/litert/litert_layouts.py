"""Operations that move entries, written into a LiteRT file of a function."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.litert_elementwise import Write, narrow
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_tensors import Tensor
from ab_jax.export.traced import Constant, Dim, Operation, Size, Value
from ab_jax.export.traced.carrying import NotCarriedError, closed

# What gives its first operand's entries, or the largest of some, and nothing else.
_MOVES = {
    *("reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "broadcast_in_dim", "tile"),
    *("pad", "reduce_window_max"),
}
_MOST_PADDED = 5  # axes


def moved_codes(file: LitertFile, operation: Operation, write: Write) -> bool:
    """Write an operation that moves codes; False: it does not, and nothing is written."""
    if operation.primitive not in _MOVES or operation.inputs[0] not in file.codes:
        return False
    before, *others = operation.inputs
    codes, after = file.codes[before], operation.outputs[0]
    if operation.primitive == "pad" and _number(others[0]) != 0:
        return False
    stored = Value(before.shape, codes.dtype)
    file.tensors[stored] = codes
    outputs = (Value(after.shape, codes.dtype),)
    inputs = (stored, *others)
    found = write(file, dataclasses.replace(operation, inputs=inputs, outputs=outputs))
    file.codes[after] = file.narrow.pop(outputs[0]) if found is None else found
    if tuple(file.codes[after].shape) != tuple(after.shape):
        file.codes[after] = file.expand(file.codes[after], after.shape)
    return True


def _number(operand: Any) -> Any:
    return np.asarray(operand.array) if isinstance(operand, Constant) else None


def _reshape(file: LitertFile, operation: Operation) -> Tensor:
    (x,) = operation.inputs
    if operation.primitive == "reshape" and operation.params["dimensions"] is not None:
        raise NotCarriedError("with an order of axes of its own")
    return file.reshape(file.tensor(x), operation.outputs[0].shape)


def _transpose(file: LitertFile, operation: Operation) -> Tensor:
    return file.transpose(file.tensor(operation.inputs[0]), operation.params["permutation"])


def _broadcast(file: LitertFile, operation: Operation) -> Tensor | None:
    x = operation.inputs[0]
    tensor = file.broadcastable(x)
    middle: list[Dim] = [1] * len(operation.outputs[0].shape)
    for place, size in zip(operation.params["broadcast_dimensions"], tensor.shape, strict=True):
        middle[place] = size
    return narrow(file, operation, file.reshape(tensor, tuple(middle)))


def _rev(file: LitertFile, operation: Operation) -> Tensor:
    tensor = file.tensor(operation.inputs[0])
    for axis in operation.params["dimensions"]:
        tensor = file.op("REVERSE_V2", tensor, np.array([axis], np.int32))
    return tensor


def _slice(file: LitertFile, operation: Operation) -> Tensor:
    (x,) = operation.inputs
    starts, ends = operation.params["start_indices"], operation.params["limit_indices"]
    steps = operation.params["strides"] or (1,) * len(starts)
    tensor, shape = file.tensor(x), operation.outputs[0].shape
    cut = [i for i, size in enumerate(x.shape) if (starts[i], ends[i], steps[i]) != (0, size, 1)]
    if not cut:
        return tensor
    if all(step == 1 for step in steps):
        sizes = [-1 if ends[i] == size else shape[i] for i, size in enumerate(x.shape)]
        return file.op("SLICE", tensor, file.shape(starts), file.shape(sizes), shape=shape)
    whole = [i for i, size in enumerate(x.shape) if ends[i] == size]
    closed = [0 if i in whole else end for i, end in enumerate(ends)]
    options = schema.StridedSliceOptionsT(endMask=sum(1 << i for i in whole))
    given = (tensor, file.shape(starts), file.shape(closed), np.array(steps, np.int32))
    return file.op("STRIDED_SLICE", *given, shape=shape, options=options)


def _concatenate(file: LitertFile, operation: Operation) -> Tensor:
    return file.joined([file.tensor(x) for x in operation.inputs], operation.params["dimension"])


def _stack(file: LitertFile, operation: Operation) -> Tensor:
    axis = operation.params["axis"]
    options = schema.PackOptionsT(valuesCount=len(operation.inputs), axis=axis)
    tensors = [file.tensor(x) for x in operation.inputs]
    return file.op("PACK", *tensors, shape=operation.outputs[0].shape, options=options)


def _split(file: LitertFile, operation: Operation) -> list[Tensor]:
    tensor = file.tensor(operation.inputs[0])
    found: list[Tensor] = []
    start: Any = 0
    for size in operation.params["sizes"]:
        found.append(file.slice(tensor, operation.params["axis"], start, start + size))
        start += size
    return found


def _unstack(file: LitertFile, operation: Operation) -> list[Tensor]:
    tensor, axis = file.tensor(operation.inputs[0]), operation.params["axis"]
    results = [
        file.new(f"{file.stem}/unpack", value.shape, value.dtype) for value in operation.outputs
    ]
    options = schema.UnpackOptionsT(num=len(results), axis=axis)
    file.append("UNPACK", [tensor], results, options)
    return results


def _tile(file: LitertFile, operation: Operation) -> Tensor:
    tensor = file.tensor(operation.inputs[0])
    reps = file.shape(operation.params["reps"])
    return file.op("TILE", tensor, reps, shape=operation.outputs[0].shape)


def counted(file: LitertFile, size: Dim) -> Tensor:
    """0, 1, 2, ..., int32."""
    if not isinstance(size, Size):
        return file.array(np.arange(size, dtype=np.int32))
    ends = (np.int32(0), file.scalar(size), np.int32(1))
    return file.op("RANGE", *ends, shape=(size,))


def _iota(file: LitertFile, operation: Operation) -> Tensor | None:
    shape, axis = operation.outputs[0].shape, operation.params["dimension"]
    middle = tuple(size if i == axis else 1 for i, size in enumerate(shape))
    return narrow(file, operation, file.reshape(counted(file, shape[axis]), middle))


def _pad(file: LitertFile, operation: Operation) -> Tensor:
    x, value = operation.inputs
    tensor, around = file.tensor(x), None
    if not isinstance(value, Constant):
        around = file.tensor(value)
    elif np.asarray(value.array).any():
        around = file.given(np.asarray(value.array))
    return padded_with(file, tensor, operation.params["padding_config"], around)


def padded_with(
    file: LitertFile, x: Tensor, config: Sequence[Sequence[Any]], value: Tensor | None = None
) -> Tensor:
    """An array with a value around and between its entries.

    Args:
      file: where to.
      x: the array.
      config: for each axis how many before, behind and between; before and behind they may be
        negative, and cut off.
      value: a scalar; None: 0, of codes that of 0.
    """
    for axis, (_, _, between) in enumerate(config):
        if between:
            x = _spread(file, x, axis, between, value)
    x = _around(file, x, [[max(closed(end), 0) for end in ends[:2]] for ends in config], value)
    for axis, (before, behind, _) in enumerate(config):
        if before < 0 or behind < 0:
            x = file.slice(x, axis, max(-before, 0), x.shape[axis] + min(behind, 0))
    return x


def _around(
    file: LitertFile, x: Tensor, amounts: Sequence[Sequence[int]], value: Tensor | None
) -> Tensor:
    if not any(map(any, amounts)):
        return x
    if len(x.shape) > _MOST_PADDED:
        raise NotCarriedError(f"of {len(x.shape)} axes")
    dtype, is_codes = x.dtype, x.scales is not None
    kind = np.dtype(np.int32) if dtype.kind in "bu" or dtype.itemsize == 2 else dtype
    if not is_codes and dtype == np.int8:
        kind = np.dtype(np.int32)
    if dtype.itemsize == 2 and dtype.kind not in "iu":
        kind = np.dtype(np.float32)
    x = x if is_codes else file.cast(x, kind)
    shape = tuple(size + sum(ends) for size, ends in zip(x.shape, amounts, strict=True))
    sizes = np.array(amounts, np.int32)
    if value is None:
        return file.cast(file.op("PAD", x, sizes, shape=shape), dtype)
    one = file.reshape(file.cast(value, kind), (1,))
    return file.cast(file.op("PADV2", x, sizes, one, shape=shape), dtype)


def _spread(file: LitertFile, x: Tensor, axis: int, between: int, value: Tensor | None) -> Tensor:
    """Values between entries along an axis: a row of them behind each entry, the last cut off."""
    before = x.shape
    x = file.reshape(x, (*before[: axis + 1], 1, *before[axis + 1 :]))
    amounts = [(0, between if i == axis + 1 else 0) for i in range(len(x.shape))]
    x = _around(file, x, amounts, value)
    longer = before[axis] * (between + 1)
    x = file.reshape(x, (*before[:axis], longer, *before[axis + 1 :]))
    return file.slice(x, axis, 0, longer - between)


def _size(file: LitertFile, operation: Operation) -> Tensor:
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
