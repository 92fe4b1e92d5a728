"""Reductions, running sums and their like, and sorting, written into an ONNX file of a function."""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FunctionFile, orderable
from ab_jax.export.traced import Operand, Operation, Size
from ab_jax.export.traced.carrying import NotCarriedError

_REDUCED = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
    "reduce_or": "ReduceMax",
    "reduce_and": "ReduceMin",
}


def _computable(file: FunctionFile, x: Operand) -> tuple[str, np.dtype]:
    """The name of an operand in numbers that can be ordered and added, and these."""
    kind = orderable(x.dtype)
    return file.cast(file.name(x), x.dtype, kind), kind


def _reduce(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    name, axes = operation.primitive, operation.params["axes"]
    if not axes:
        return file.name(x)
    if name in ("reduce_or", "reduce_and") and x.dtype != bool:
        raise NotCarriedError(f"of {x.dtype}")
    found, kind = _computable(file, x)
    # Sums of int32 do not wrap there.
    if kind.kind == "i" and name in ("reduce_sum", "reduce_prod"):
        found, kind = file.cast(found, kind, np.int64), np.dtype(np.int64)
    found = file.op(_REDUCED[name], found, np.array(axes, np.int64), keepdims=0)
    return file.cast(found, kind, operation.outputs[0].dtype)


def _reduce_xor(file: FunctionFile, operation: Operation) -> str:
    (x,) = operation.inputs
    if x.dtype != bool:
        raise NotCarriedError(f"of {x.dtype}")
    axes = np.array(operation.params["axes"], np.int64)
    count = file.op(
        "ReduceSum", file.op("Cast", file.name(x), to=TensorProto.INT32), axes, keepdims=0
    )
    return file.op("Cast", file.op("Mod", count, np.int32(2)), to=TensorProto.BOOL)


def _arg(file: FunctionFile, operation: Operation) -> str:
    (axis,) = operation.params["axes"]
    found, _ = _computable(file, operation.inputs[0])
    operator = "ArgMax" if operation.primitive == "argmax" else "ArgMin"
    found = file.op(operator, found, axis=int(axis), keepdims=0)
    return file.cast(found, np.int64, operation.outputs[0].dtype)


def _cumsum(file: FunctionFile, operation: Operation) -> str:
    name, kind = _computable(file, operation.inputs[0])
    axis, reverse = operation.params["axis"], int(operation.params["reverse"])
    found = file.op("CumSum", name, np.int64(axis), reverse=reverse)
    return file.cast(found, kind, operation.outputs[0].dtype)


def _logsumexp(file: FunctionFile, a: str, b: str, kind: Any) -> str:
    """log(exp(a) + exp(b)); of two that are -inf too."""
    larger = file.op("Max", a, b)
    shift = file.op("Where", file.op("IsInf", larger), kind(0), larger)
    parts = [file.op("Exp", file.op("Sub", x, shift)) for x in (a, b)]
    return file.op("Add", file.op("Log", file.op("Add", *parts)), shift)


def _running(
    combine: Callable[[FunctionFile, str, str, Any], str],
    neutral: Callable[[np.dtype], Any],
) -> Write:
    """By doubling: after step n each entry has those up to 2**n before it in itself."""

    def write(file: FunctionFile, operation: Operation) -> str:
        (x,) = operation.inputs
        axis, reverse = operation.params["axis"], operation.params["reverse"]
        size = x.shape[axis]
        if isinstance(size, Size):
            raise NotCarriedError(f"along an axis of {size}, which is open")
        name, kind = _computable(file, x)
        edge, step = kind.type(neutral(kind)), 1
        while step < size:
            ends = np.zeros((2, len(x.shape)), np.int64)
            ends[int(reverse), axis] = step
            moved = file.op("Pad", name, ends.reshape(-1), edge)
            moved = file.slice(
                moved, axis, step if reverse else 0, step + size if reverse else size
            )
            name = combine(file, name, moved, kind.type)
            step *= 2
        return file.cast(name, kind, operation.outputs[0].dtype)

    return write


def _lowest(kind: np.dtype) -> Any:
    return -np.inf if np.issubdtype(kind, np.floating) else np.iinfo(kind).min


def _highest(kind: np.dtype) -> Any:
    return np.inf if np.issubdtype(kind, np.floating) else np.iinfo(kind).max


def _sort(file: FunctionFile, operation: Operation) -> list[str]:
    """From the last key to the first: each is a stable sort of all that follows it."""
    axis, keys = operation.params["dimension"], operation.params["num_keys"]
    size = operation.inputs[0].shape[axis]
    count = file.shape([size])
    order = ""
    for x in reversed(operation.inputs[:keys]):
        name, _ = _computable(file, x)
        if order:
            name = file.op("GatherElements", name, order, axis=axis)
        options = {"axis": axis, "largest": 0, "sorted": 1}
        _, places = file.ops("TopK", name, count, count=2, **options)
        order = file.op("GatherElements", order, places, axis=axis) if order else places
    return [file.op("GatherElements", file.name(x), order, axis=axis) for x in operation.inputs]


def _top_k(file: FunctionFile, operation: Operation) -> list[str]:
    (x,) = operation.inputs
    params = operation.params
    axis = params.get("axis", params.get("reduction_dimension", len(x.shape) - 1))
    largest = int(params.get("is_max_k", True))
    name, kind = _computable(file, x)
    values, places = file.ops(
        "TopK",
        name,
        file.shape([params["k"]]),
        count=2,
        axis=int(axis) % len(x.shape),
        largest=largest,
        sorted=1,
    )
    found = file.cast(values, kind, operation.outputs[0].dtype)
    return [found, file.cast(places, np.int64, operation.outputs[1].dtype)]


REDUCTIONS: dict[str, Write] = {
    **dict.fromkeys(_REDUCED, _reduce),
    "reduce_xor": _reduce_xor,
    **dict.fromkeys(("argmax", "argmin"), _arg),
    "cumsum": _cumsum,
    "cumprod": _running(lambda file, a, b, kind: file.op("Mul", a, b), lambda kind: 1),
    "cummax": _running(lambda file, a, b, kind: file.op("Max", a, b), _lowest),
    "cummin": _running(lambda file, a, b, kind: file.op("Min", a, b), _highest),
    "cumlogsumexp": _running(_logsumexp, _lowest),
    "sort": _sort,
    **dict.fromkeys(("top_k", "approx_top_k"), _top_k),
}
