"""Pickles of PyTorch's state dicts, read without running them.

A pickle is a program: Python's own reader imports what it names and calls it. Here the few steps
that `torch.save` writes for named tensors are followed, and no others. What would be called is
never looked up, let alone called: the names that state dicts have stand for plain values, and all
other names are refused.

Steps: https://github.com/python/cpython/blob/v3.11.0/Lib/pickletools.py
"""

import dataclasses
import pickle
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from ab_jax.safetensors_header import MalformedError, is_shape, shown

_DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
}
_DICT, _TENSOR = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle would import."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """Numbers side by side, of which tensors are views."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A part of a storage in one piece; `offset` is its first number, `axes` are as in `Place`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def unpickled(file: BinaryIO) -> Any:
    """The value of the pickle that a file goes on with, of plain values and the classes above.

    Texts, integers, True, False, None, tuples, lists, and dictionaries whose keys are texts. Memory
    is at most some hundred times the length of the pickle.

    Raises:
      MalformedError: it is damaged, or has what state dicts of tensors have not; names it.
    """
    try:
        return _followed(file)
    except MalformedError:
        raise
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise MalformedError(
            f"its pickle is damaged, cut off or too long: {shown(str(error))}"
        ) from None


def _followed(file: BinaryIO) -> Any:
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def read(count: int) -> bytes:
        if len(found := file.read(count)) < count:
            raise ValueError("it ends within a step")
        return found

    def number(size: int, signed: bool = False) -> int:
        return int.from_bytes(read(size), "little", signed=signed)

    while True:
        match read(1):
            case pickle.STOP:
                (value,) = stack
                return value
            case pickle.PROTO:
                read(1)
            case pickle.MARK:
                marks.append(stack)
                stack = []
            case pickle.BINPUT:
                memo[number(1)] = stack[-1]
            case pickle.LONG_BINPUT:
                memo[number(4)] = stack[-1]
            case pickle.BINGET:
                stack.append(memo[number(1)])
            case pickle.LONG_BINGET:
                stack.append(memo[number(4)])
            case pickle.NONE:
                stack.append(None)
            case pickle.NEWTRUE:
                stack.append(True)
            case pickle.NEWFALSE:
                stack.append(False)
            case pickle.BININT1:
                stack.append(number(1))
            case pickle.BININT2:
                stack.append(number(2))
            case pickle.BININT:
                stack.append(number(4, signed=True))
            case pickle.LONG1:
                stack.append(number(number(1), signed=True))
            case pickle.BINUNICODE:
                stack.append(read(number(4)).decode())
            case pickle.EMPTY_TUPLE:
                stack.append(())
            case pickle.TUPLE1:
                stack[-1:] = [(stack[-1],)]
            case pickle.TUPLE2:
                stack[-2:] = [(stack[-2], stack[-1])]
            case pickle.TUPLE3:
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            case pickle.TUPLE:
                stack, items = marks.pop(), stack
                stack.append(tuple(items))
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.APPEND:
                item = stack.pop()
                stack[-1].append(item)
            case pickle.APPENDS:
                stack, items = marks.pop(), stack
                stack[-1].extend(items)
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.SETITEM:
                _set_items(stack[-3], stack[-2:])
                del stack[-2:]
            case pickle.SETITEMS:
                stack, items = marks.pop(), stack
                _set_items(stack[-1], items)
            case pickle.GLOBAL:
                stack.append(_known(file.readline(), file.readline()))
            case pickle.BINPERSID:
                stack.append(_storage(stack.pop()))
            case pickle.REDUCE:
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case pickle.BUILD:
                # What a module notes beside its names, such as the versions of its parts.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise MalformedError("its pickle sets the state of what is no dictionary")
            case step:
                raise MalformedError(
                    f"its pickle has the step {shown(step)}, as state dicts do not"
                )


# What a pickle's values are is never shown in an error, but for texts and numbers: a few steps
# write a value whose text is longer than any memory.


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise MalformedError("its pickle sets items of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise MalformedError("its pickle has a dictionary whose keys are no texts")
        if key in target:
            raise MalformedError(f"{shown(key)} stands in it twice")
        target[key] = value


def _known(*lines: bytes) -> _Name:
    name = b".".join(line.removesuffix(b"\n") for line in lines).decode()
    if name not in (_DICT, _TENSOR, *_DTYPES):
        raise MalformedError(
            f"its pickle would import {shown(name)}, for which state dicts of tensors have no use. "
            f"Do not load it elsewhere, unless you trust who made it"
        )
    return _Name(name)


def _storage(description: Any) -> Storage:
    match description:
        case ("storage", _Name(name=name), str(key), str(), int(count), None) if (
            name in _DTYPES and count > 0
        ):
            return Storage(key, _DTYPES[name], count)
    raise MalformedError("its pickle refers to what is no storage of a tensor")


def _made(function: Any, arguments: Any) -> Any:
    """What the pickle would call a function for: an empty dictionary, or a tensor."""
    match function, arguments:
        case _Name(name=name), () if name == _DICT:
            return {}
        case _Name(name=name), (Storage() as storage, int(offset), shape, strides, _, _) if (
            name == _TENSOR
        ):
            return _tensor(storage, offset, shape, strides)
    raise MalformedError("its pickle calls what state dicts of tensors do not, or otherwise")


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any) -> Tensor:
    what = f"a tensor of storage {shown(storage.key)}"
    if not isinstance(shape, tuple) or not is_shape(list(shape)):
        raise MalformedError(f"{what} is of a shape that no array has")
    integers = isinstance(strides, tuple) and all(type(stride) is int for stride in strides)
    if not integers or len(strides) != len(shape):
        raise MalformedError(f"{what} has no stride for each axis")
    # Axes of one element come first, since their strides say nothing.
    axes = sorted(range(len(shape)), key=lambda axis: (shape[axis] > 1, -strides[axis]))
    expected = 1
    for axis in reversed(axes):
        if shape[axis] > 1 and strides[axis] != expected:
            raise MalformedError(
                f"{what} does not lie there in one piece; save tensors after tensor.contiguous()"
            )
        expected *= shape[axis]
    if offset < 0 or offset + expected > storage.count:
        raise MalformedError(f"{what} reaches beyond the {storage.count} numbers of that")
    return Tensor(storage, offset, shape, tuple(axes))
