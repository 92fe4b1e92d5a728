"""Reductions, running sums and the largest of some, written into a LiteRT file of a function."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.litert_elementwise import Write
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_tensors import Tensor, orderable
from ab_jax.export.traced import Operation
from ab_jax.export.traced.carrying import NotCarriedError

_REDUCED = {
    "reduce_sum": "SUM",
    "reduce_max": "REDUCE_MAX",
    "reduce_min": "REDUCE_MIN",
    "reduce_prod": "REDUCE_PROD",
    "reduce_or": "REDUCE_ANY",
    "reduce_and": "REDUCE_ALL",
}


def _reduce(file: LitertFile, operation: Operation) -> Tensor:
    (x,), name = operation.inputs, operation.primitive
    tensor, of_bools = file.tensor(x), name in ("reduce_or", "reduce_and")
    if of_bools and x.dtype != bool:
        raise NotCarriedError(f"of {x.dtype}")
    if not operation.params["axes"]:
        return tensor
    if not of_bools:
        tensor = file.cast(tensor, orderable(x.dtype))
    axes = np.array(operation.params["axes"], np.int32)
    options = schema.ReducerOptionsT(keepDims=False)
    shape = operation.outputs[0].shape
    result = file.op(_REDUCED[name], tensor, axes, shape=shape, options=options)
    return file.cast(result, operation.outputs[0].dtype)


def _arg(file: LitertFile, operation: Operation) -> Tensor:
    (x,), (value,) = operation.inputs, operation.outputs
    (axis,) = operation.params["axes"]
    tensor, code = file.cast(file.tensor(x), orderable(x.dtype)), operation.primitive
    made = schema.ArgMaxOptionsT if code == "argmax" else schema.ArgMinOptionsT
    options = made(outputType=schema.TensorType.INT32)
    code = "ARG_MAX" if code == "argmax" else "ARG_MIN"
    found = file.op(
        code, tensor, np.int32(axis), shape=value.shape, dtype=np.int32, options=options
    )
    return file.cast(found, value.dtype)


def _cumsum(file: LitertFile, operation: Operation) -> Tensor:
    (x,) = operation.inputs
    tensor = file.cast(file.tensor(x), orderable(x.dtype))
    options = schema.CumsumOptionsT(exclusive=False, reverse=bool(operation.params["reverse"]))
    found = file.op("CUMSUM", tensor, np.int32(operation.params["axis"]), options=options)
    return file.cast(found, operation.outputs[0].dtype)


def _top_k(file: LitertFile, operation: Operation) -> list[Tensor]:
    (x,), params = operation.inputs, operation.params
    axis = params.get("axis", params.get("reduction_dimension", len(x.shape) - 1))
    if int(axis) % len(x.shape) != len(x.shape) - 1 or not params.get("is_max_k", True):
        raise NotCarriedError("along another axis than the last, or of the smallest")
    tensor = file.cast(file.tensor(x), orderable(x.dtype))
    values, places = (
        file.new(f"{file.stem}/top_k", value.shape, dtype)
        for value, dtype in zip(operation.outputs, (tensor.dtype, np.int32), strict=True)
    )
    file.append("TOPK_V2", [tensor, file.scalar(params["k"])], [values, places])
    found = zip((values, places), operation.outputs, strict=True)
    return [file.cast(tensor, value.dtype) for tensor, value in found]


REDUCTIONS: dict[str, Write] = {
    **dict.fromkeys(_REDUCED, _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    "cumsum": _cumsum,
    "top_k": _top_k,
}
