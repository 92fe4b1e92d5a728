"""Softmax, layer norm and GELU as ONNX's operators of these names."""

from collections.abc import Mapping

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FunctionFile
from ab_jax.export.traced import Operation


def _softmax(file: FunctionFile, operation: Operation) -> str:
    operator = "Softmax" if operation.primitive == "softmax" else "LogSoftmax"
    return file.op(operator, file.name(operation.inputs[0]), axis=operation.params["axis"])


def _layer_norm(file: FunctionFile, operation: Operation) -> str:
    names = [file.name(x) for x in operation.inputs]
    return file.op("LayerNormalization", *names, axis=-1, epsilon=operation.params["epsilon"])


def _gelu(file: FunctionFile, operation: Operation) -> str:
    approximate = "tanh" if operation.params["approximate"] else "none"
    return file.op("Gelu", file.name(operation.inputs[0]), approximate=approximate)


#: What is written for each of `ab_jax.export.traced.named_functions`.
NAMED: Mapping[str, Write] = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
}
