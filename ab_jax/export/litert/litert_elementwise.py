"""Operations on each entry, written into a LiteRT file of a function.

Numbers that LiteRT has few operators for are computed in wider ones and cast back: float16 and
bfloat16 in float32, integers below 32 bits in int32, uint32 in int64. What is repeated along an
axis of size 1 is repeated by the operators themselves, and stays narrow as long as it can.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_tensors import (
    Input,
    Tensor,
    computed_in,
    orderable,
)
from ab_jax.export.traced import Operation, Shape
from ab_jax.export.traced.carrying import NotCarriedError

#: Writes an operation, and gives the tensors of its results.
Write = Callable[[LitertFile, Operation], Any]

_UNARY = {
    **{name: name.upper() for name in ("abs", "neg", "floor", "ceil", "exp", "log", "sqrt")},
    **{name: name.upper() for name in ("rsqrt", "sin", "cos", "tanh", "square", "logistic")},
    "sign": "SIGN",
}
_BINARY = {
    **{name: name.upper() for name in ("add", "sub", "mul")},
    "add_any": "ADD",
    "max": "MAXIMUM",
    "min": "MINIMUM",
    "atan2": "ATAN2",
}
_COMPARED = {
    **{"lt": "LESS", "le": "LESS_EQUAL", "gt": "GREATER", "ge": "GREATER_EQUAL"},
    **{"eq": "EQUAL", "ne": "NOT_EQUAL"},
}
_LOGICAL = {"and": "LOGICAL_AND", "or": "LOGICAL_OR", "not": "LOGICAL_NOT", "xor": "NOT_EQUAL"}
_OF_FLOATS = {
    *("floor", "ceil", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "logistic", "atan2"),
}
_MOST_AXES = 5  # of operands that are repeated by operators
_NOT_REPEATED = {"ATAN2"}
# Powers up to this are products, as in JAX.
_LARGEST_PRODUCT = 32


def entries(write: Callable[..., Tensor]) -> Write:
    """An operation on each entry, written in the numbers that its inputs are computed in.

    `write(file, operation, kind, *tensors)` is given these numbers, NumPy's scalar type, and gives
    its result in them, which may be narrow.
    """

    @functools.wraps(write)
    def written(file: LitertFile, operation: Operation) -> Tensor | None:
        kind = computed_in(operation.inputs[0].dtype)
        tensors = [file.cast(file.broadcastable(x), computed_in(x.dtype)) for x in operation.inputs]
        return narrow(file, operation, write(file, operation, kind.type, *tensors))

    return written


def narrow(file: LitertFile, operation: Operation, result: Tensor) -> Tensor | None:
    """Make a result known, which may have axes of size 1 where the operation's repeats."""
    (value,) = operation.outputs
    result = file.cast(result, value.dtype)
    shape = (1,) * (len(value.shape) - len(result.shape)) + tuple(result.shape)
    if shape == tuple(value.shape):
        return file.reshape(result, value.shape)
    file.narrow[value] = file.reshape(result, shape)
    return None


def joint(*tensors: Tensor) -> Shape:
    """The shape of what operators on each entry make of these."""
    count = max(len(x.shape) for x in tensors)
    shapes = [(1,) * (count - len(x.shape)) + tuple(x.shape) for x in tensors]
    return tuple(
        next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes, strict=True)
    )


def each(file: LitertFile, code: str, *inputs: Input, dtype: Any = None, **options: Any) -> Tensor:
    """Append an operator on each entry of several arrays."""
    tensors = [file.given(x) for x in inputs]
    shape = joint(*tensors)
    if code in _NOT_REPEATED or len(shape) > _MOST_AXES:
        tensors = [x if x.shape == shape else _repeated(file, x, shape) for x in tensors]
    return file.op(code, *tensors, shape=shape, dtype=dtype, **options)


def _repeated(file: LitertFile, x: Tensor, shape: Shape) -> Tensor:
    wide = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
    return file.expand(file.reshape(x, wide), shape)


def _plain(name: str, code: str) -> Write:
    @entries
    def write(file: LitertFile, operation: Operation, kind: Any, *tensors: Tensor) -> Tensor:
        if name in _OF_FLOATS and np.dtype(kind).kind != "f":
            raise NotCarriedError(f"of {operation.inputs[0].dtype}")
        return each(file, code, *tensors)

    return write


def _added(file: LitertFile, operation: Operation) -> Tensor | None:
    """A sum, with the clipping behind it, which the operator does by itself."""
    activation, value, clips = file.clipped.get(operation, (0, operation.outputs[0], []))
    tensors = [file.cast(file.broadcastable(x), computed_in(x.dtype)) for x in operation.inputs]
    if not clips or joint(*tensors) != tuple(value.shape):
        return narrow(file, operation, each(file, "ADD", *tensors))
    options = schema.AddOptionsT(fusedActivationFunction=activation)
    file.tensors[value] = each(file, "ADD", *tensors, options=options)
    file.written.update(clips)
    return None


def _bounded(name: str, code: str) -> Write:
    """Max or Min; the larger of a number and 0 as the operator of that name."""
    plain = _plain(name, code)

    def write(file: LitertFile, operation: Operation) -> Tensor | None:
        numbers = [np.asarray(x.array) for x in operation.inputs if hasattr(x, "array")]
        dtype = operation.outputs[0].dtype
        if name == "max" and dtype == np.float32 and numbers and not numbers[0].any():
            (x,) = [x for x in operation.inputs if not hasattr(x, "array")]
            if x.shape == operation.outputs[0].shape:
                return narrow(file, operation, file.op("RELU", file.broadcastable(x)))
        return plain(file, operation)

    return write


def _compared(code: str) -> Write:
    def write(file: LitertFile, operation: Operation) -> Tensor | None:
        tensors = [file.cast(file.broadcastable(x), orderable(x.dtype)) for x in operation.inputs]
        return narrow(file, operation, each(file, code, *tensors, dtype=np.bool_))

    return write


def _logical(code: str) -> Write:
    def write(file: LitertFile, operation: Operation) -> Tensor | None:
        if operation.inputs[0].dtype != bool:
            raise NotCarriedError(f"of {operation.inputs[0].dtype}")
        tensors = [file.broadcastable(x) for x in operation.inputs]
        return narrow(file, operation, each(file, code, *tensors))

    return write


@entries
def _integer_pow(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    power = int(operation.params["y"])
    if abs(power) > _LARGEST_PRODUCT:
        return each(file, "POW", x, kind(power))
    if power == 0:
        return each(file, "ADD", each(file, "MUL", x, kind(0)), kind(1))
    result, square, left = None, x, abs(power)
    while True:
        if left & 1:
            result = square if result is None else each(file, "MUL", result, square)
        left >>= 1
        if not left:
            break
        square = each(file, "MUL", square, square)
    assert result is not None
    return result if power > 0 else each(file, "DIV", kind(1), result)


def _quotient(file: LitertFile, operation: Operation) -> Tensor | None:
    x, y = operation.inputs
    kind = computed_in(x.dtype)
    if kind.kind in "iu" and not (hasattr(y, "array") and np.all(y.array)):
        raise NotCarriedError("of integers by what may be 0")
    if kind == np.int64:
        raise NotCarriedError(f"of {x.dtype}")
    tensors = [file.cast(file.broadcastable(v), kind) for v in (x, y)]
    return narrow(file, operation, each(file, "DIV", *tensors))


@entries
def _remainder(file: LitertFile, operation: Operation, kind: Any, x: Tensor, y: Tensor) -> Tensor:
    """With the sign of the dividend."""
    if np.dtype(kind).kind != "f" and not hasattr(operation.inputs[1], "array"):
        raise NotCarriedError("of integers by what may be 0")
    left = each(file, "FLOOR_MOD", each(file, "ABS", x), each(file, "ABS", y))
    return each(file, "MUL", each(file, "SIGN", x), left)


@entries
def _square(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    return each(file, "MUL", x, x)


@entries
def _exp2(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    return each(file, "EXP", each(file, "MUL", x, kind(math.log(2))))


@entries
def _tan(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    return each(file, "DIV", each(file, "SIN", x), each(file, "COS", x))


@entries
def _atan(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    return each(file, "ATAN2", x, kind(1))


@entries
def _round(file: LitertFile, operation: Operation, kind: Any, x: Tensor) -> Tensor:
    if int(operation.params["rounding_method"]) == 1:  # half to even
        return each(file, "ROUND", x)
    up = each(file, "FLOOR", each(file, "ADD", each(file, "ABS", x), kind(0.5)))
    return each(file, "MUL", each(file, "SIGN", x), up)


@entries
def _clamp(file: LitertFile, operation: Operation, kind: Any, *tensors: Tensor) -> Tensor:
    low, x, high = tensors
    return each(file, "MINIMUM", each(file, "MAXIMUM", x, low), high)


def _pow(file: LitertFile, operation: Operation) -> Tensor | None:
    kind = computed_in(operation.inputs[0].dtype)
    tensors = [file.cast(file.broadcastable(v), kind) for v in operation.inputs]
    return narrow(file, operation, each(file, "POW", *tensors))


def _is_finite(file: LitertFile, operation: Operation) -> Tensor | None:
    """Of a number times 0, which is 0, is not a number otherwise."""
    (x,) = operation.inputs
    tensor = file.cast(file.broadcastable(x), computed_in(x.dtype))
    zero = each(file, "MUL", tensor, tensor.dtype.type(0))
    return narrow(file, operation, each(file, "EQUAL", zero, zero, dtype=np.bool_))


def _select(file: LitertFile, operation: Operation) -> Tensor | None:
    which, *cases = operation.inputs
    kind = orderable(operation.outputs[0].dtype)
    tensors = [file.cast(file.broadcastable(case), kind) for case in cases]
    chosen = file.broadcastable(which)
    result = tensors[0]
    for i, tensor in enumerate(tensors[1:], 1):
        test = chosen
        if which.dtype != bool:
            number = np.asarray(i, which.dtype)
            test = each(file, "EQUAL", chosen, number, dtype=np.bool_)
        result = each(file, "SELECT_V2", test, tensor, result, dtype=kind)
    return narrow(file, operation, result)


def _converted(file: LitertFile, operation: Operation) -> Tensor | None:
    (x,) = operation.inputs
    tensor, after = file.broadcastable(x), np.dtype(operation.params["new_dtype"])
    if after.kind == "b" != tensor.dtype.kind:
        tensor = file.cast(tensor, computed_in(tensor.dtype))
        tensor = each(file, "NOT_EQUAL", tensor, tensor.dtype.type(0), dtype=np.bool_)
    elif computed_in(tensor.dtype) != tensor.dtype:
        tensor = file.cast(tensor, computed_in(tensor.dtype))
    return narrow(file, operation, tensor)


ELEMENTWISE: dict[str, Write] = {
    **{name: _plain(name, code) for name, code in (_UNARY | _BINARY).items()},
    **{name: _compared(code) for name, code in _COMPARED.items()},
    **{name: _logical(code) for name, code in _LOGICAL.items()},
    **{name: _bounded(name, _BINARY[name]) for name in ("max", "min")},
    **dict.fromkeys(("add", "add_any"), _added),
    "integer_pow": _integer_pow,
    "div": _quotient,
    "rem": _remainder,
    "square": _square,
    "exp2": _exp2,
    "tan": _tan,
    "atan": _atan,
    "round": _round,
    "clamp": _clamp,
    "pow": _pow,
    "is_finite": _is_finite,
    "select_n": _select,
    "convert_element_type": _converted,
}
