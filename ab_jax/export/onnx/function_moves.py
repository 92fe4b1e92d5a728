"""Codes that operations move about, as codes."""

import dataclasses

import numpy as np

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FunctionFile
from ab_jax.export.onnx.function_products import add_codes
from ab_jax.export.traced import Constant, Operand, Operation, Value

# What gives its first operand's entries, or the largest of some, and nothing else.
_MOVES = {
    *("reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "broadcast_in_dim", "tile"),
    *("pad", "reduce_window_max"),
}


def moved_codes(file: FunctionFile, operation: Operation, write: Write) -> str | None:
    """Write an operation that moves codes; None: it does not, and nothing is written.

    Returns:
      The name of the numbers; the codes are known as those of the operation's output.
    """
    if operation.primitive not in _MOVES or operation.inputs[0] not in file.quantized:
        return None
    before, *others = operation.inputs
    after = operation.outputs[0]
    codes = file.quantized[before]
    if operation.primitive == "pad":
        (around,) = others
        if not isinstance(around, Constant) or np.asarray(around.array).any():
            return None
        others = [Constant(np.asarray(codes.offset, np.uint8))]
    stored = Value(before.shape, np.dtype(np.uint8))
    file.names[stored] = codes.codes
    operands: tuple[Operand, ...] = (stored, *others)
    outputs = (Value(after.shape, stored.dtype),)
    name = write(file, dataclasses.replace(operation, inputs=operands, outputs=outputs))
    assert isinstance(name, str), "moves have one result"
    return add_codes(file, after, dataclasses.replace(codes, codes=name))
