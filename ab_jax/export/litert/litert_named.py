"""Softmax and GELU as LiteRT's operators of these names."""

from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.litert_elementwise import Write
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_tensors import Tensor
from ab_jax.export.traced import Operation


def _gelu(file: LitertFile, operation: Operation) -> Tensor:
    options = schema.GeluOptionsT(approximate=operation.params["approximate"])
    return file.op("GELU", file.tensor(operation.inputs[0]), options=options)


def _softmax(file: LitertFile, operation: Operation) -> Tensor:
    """Over the last axis, which changes places with another one if that is wanted."""
    x, axis = file.tensor(operation.inputs[0]), operation.params["axis"]
    order = list(range(len(x.shape)))
    order[axis], order[-1] = order[-1], order[axis]
    x = file.transpose(x, order)
    if operation.primitive == "softmax":
        found = file.op("SOFTMAX", x, options=schema.SoftmaxOptionsT(beta=1.0))
    else:
        found = file.op("LOG_SOFTMAX", x, options=schema.LogSoftmaxOptionsT())
    return file.transpose(found, order)


#: What is written for those of `ab_jax.export.traced.named_functions` that LiteRT has.
NAMED: dict[str, Write] = {"softmax": _softmax, "log_softmax": _softmax, "gelu": _gelu}
