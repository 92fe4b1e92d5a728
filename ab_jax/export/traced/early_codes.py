"""Quantization moved to where it costs least: right behind the layer whose output it rounds.

Then that layer can give out codes at once, and what lies between works on codes. The results stay
the same bit for bit:

- two products that take one value in the same codes share them;
- unsigned codes are taken before a max pooling, not after it: rounding is monotonic, so the largest
  value has the largest code;
- a ReLU before unsigned codes is dropped: they begin at 0 anyway, and end at their limit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ab_jax.export.traced.traced_graph import Constant, Graph, Operand, Operation, Users, Value


def quantize_early(graph: Graph) -> Graph:
    """The graph with each `quantize` as early as it can be."""
    return _without_clips(_before_pools(_shared(graph)))


def _shared(graph: Graph) -> Graph:
    first: dict[Any, Value] = {}
    same: dict[Operand, Operand] = {}
    for operation in graph.operations:
        if operation.primitive != "quantize":
            continue
        x, limit = operation.inputs
        if isinstance(limit, Constant):
            quantizer, result = operation.params["quantizer"], operation.outputs[0]
            key = (x, quantizer.levels, np.asarray(limit.array).tobytes(), result.dtype)
            same[result] = first.setdefault(key, result)
    return graph.with_operands({x: y for x, y in same.items() if x is not y})


def _before_pools(graph: Graph) -> Graph:
    users = Users(graph)
    written: dict[Operation, list[Operation]] = {}
    for pool in graph.operations:
        quantize = users.only(pool.outputs[0]) if pool.primitive == "reduce_window_max" else None
        if quantize is None or not _is_unsigned(quantize):
            continue
        # What surrounds the image must have a code, too. Nothing is lower than code 0.
        made_by = users.maker(pool.inputs[0])
        moved = [pool]
        if made_by is not None and made_by.primitive == "pad":
            if users.only(made_by.outputs[0]) is not pool or _number(made_by.inputs[1]) != 0:
                continue
            moved = [made_by, pool]
        written |= {part: [] for part in moved}
        written[quantize] = _in_front(quantize, moved)
    return graph.rewritten(written)


def _in_front(quantize: Operation, moved: Sequence[Operation]) -> list[Operation]:
    """The quantization, and what came before it behind it."""
    x = moved[0].inputs[0]
    value = Value(x.shape, x.dtype)
    inputs = (x, *quantize.inputs[1:])
    operations = [dataclasses.replace(quantize, inputs=inputs, outputs=(value,))]
    for i, operation in enumerate(moved):
        outputs = quantize.outputs
        if i < len(moved) - 1:
            outputs = (Value(operation.outputs[0].shape, x.dtype),)
        inputs = (value, *operation.inputs[1:])
        operations.append(dataclasses.replace(operation, inputs=inputs, outputs=outputs))
        value = outputs[0]
    return operations


def _without_clips(graph: Graph) -> Graph:
    users = Users(graph)
    written: dict[Operation, list[Operation]] = {}
    for operation in graph.operations:
        if not _is_unsigned(operation):
            continue
        x, limit = operation.inputs
        while (below := _below_clip(users.maker(x), limit)) is not None:
            x = below
        if x is not operation.inputs[0]:
            written[operation] = [dataclasses.replace(operation, inputs=(x, limit))]
    return graph.rewritten(written)


def _below_clip(clip: Operation | None, limit: Operand) -> Operand | None:
    """What a clip takes that changes no code from 0 to the limit; None: it is no such clip."""
    if clip is None:
        return None
    end = _number(limit)
    if clip.primitive == "clamp":
        low, x, high = clip.inputs
        lowest, highest = _number(low), _number(high)
        fits = lowest is not None and highest is not None and lowest <= 0 and highest >= end
        return x if fits else None
    if clip.primitive not in ("max", "min"):
        return None
    values = [x for x in clip.inputs if isinstance(x, Value)]
    numbers = [_number(x) for x in clip.inputs if not isinstance(x, Value)]
    if len(values) != 1 or numbers[0] is None or values[0].shape != clip.outputs[0].shape:
        return None
    harmless = numbers[0] <= 0 if clip.primitive == "max" else numbers[0] >= end
    return values[0] if harmless else None


def _number(operand: Operand) -> Any:
    """The number that a constant is, in all of its entries; None: it is none."""
    if not isinstance(operand, Constant) or not isinstance(operand.dtype, np.dtype):
        return None
    array = np.asarray(operand.array)
    first = array.reshape(-1)[0] if array.size else None
    return first if array.size and (array == first).all() else None


def _is_unsigned(operation: Operation) -> bool:
    """Whether it makes codes from 0 to one limit that is known."""
    if operation.primitive != "quantize":
        return False
    return not operation.params["quantizer"].signed and _number(operation.inputs[1]) is not None
