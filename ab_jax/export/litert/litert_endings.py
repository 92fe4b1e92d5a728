"""What follows products with a weight: a bias, a clipping and codes, which one operator can do."""

import dataclasses

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.traced import Constant, Graph, Operand, Operation, Value, endings
from ab_jax.export.traced.traced_graph import Users
from ab_jax.export.traced.weighted_products import weighted_product

_NONE = schema.ActivationFunctionType.NONE
_RELU = schema.ActivationFunctionType.RELU
_RELU6 = schema.ActivationFunctionType.RELU6


@dataclasses.dataclass(frozen=True, eq=False)
class LitertEnding:
    """What becomes of a product, and nothing else does.

    Attributes:
      bias: [channels out], those of several axes in their order; None: there is none.
      activation: the clipping, by the schema's number.
      value: what the product, its bias and the clipping give.
      quantize: the operation that makes codes of that; None: there is none.
      operations: all of these but the product and `quantize`.
    """

    bias: np.ndarray | None
    activation: int
    value: Value
    quantize: Operation | None
    operations: tuple[Operation, ...]


def litert_endings(graph: Graph) -> dict[Operation, LitertEnding]:
    """What follows each product with a weight, float32."""
    users, known = Users(graph), endings(graph)
    found = {}
    for operation in graph.operations:
        product = weighted_product(operation)
        if product is None or product.output.dtype != np.float32:
            continue
        ending, value, parts = known.get(operation), operation.outputs[0], []
        bias = None
        if ending is not None and ending.bias is not None:
            sizes = [1] * ending.bias.ndim
            for axis, own in product.channels.items():
                sizes[axis] = product.weight.shape[own]
            bias = np.broadcast_to(ending.bias, sizes).reshape(-1)
        if ending is not None and ending.add is not None:
            parts.append(ending.add)
            value = ending.add.outputs[0]
        clips, activation = _clipping(users, value)
        if clips:
            parts += clips
            value = clips[-1].outputs[0]
        following = users.only(value)
        quantize = following if following and following.primitive == "quantize" else None
        found[operation] = LitertEnding(bias, activation, value, quantize, tuple(parts))
    return found


def clipped_sums(graph: Graph) -> dict[Operation, tuple[int, Value, list[Operation]]]:
    """The sums that a clipping follows."""
    users = Users(graph)
    found = {}
    for operation in graph.operations:
        if operation.primitive == "add" and operation.outputs[0].dtype == np.float32:
            clips, activation = _clipping(users, operation.outputs[0])
            if clips:
                found[operation] = (activation, clips[-1].outputs[0], clips)
    return found


def code_names(graph: Graph) -> dict[Operation, str]:
    """Names for what each `quantize` makes."""
    made = (operation for operation in graph.operations if operation.primitive == "quantize")
    return {operation: f"codes/{i}" for i, operation in enumerate(made)}


def _clipping(users: Users, value: Value) -> tuple[list[Operation], int]:
    """The operations that a clipping of LiteRT's is; of one that codes from 0 on follow, too."""
    first = users.only(value)
    if first is None:
        return [], _NONE
    if first.primitive == "clamp":
        low, _, high = first.inputs
        ends = _number(low), _number(high)
        return ([first], _RELU6) if ends == (0, 6) else ([], _NONE)
    second = users.only(first.outputs[0])
    ends = _end(first, "max"), _end(first, "min")
    if ends[0] == 0:
        if second is not None and _end(second, "min") == 6:
            return [first, second], _RELU6
        return [first], _RELU
    if ends[1] == 6:
        if second is not None and _end(second, "max") == 0:
            return [first, second], _RELU6
        of_codes = second is not None and second.primitive == "quantize"
        if second is not None and of_codes and not second.params["quantizer"].signed:
            return [first], _RELU6
    return [], _NONE


def _end(operation: Operation, primitive: str) -> float | None:
    """The number that an operation clips at."""
    if operation.primitive != primitive:
        return None
    numbers = [_number(x) for x in operation.inputs if not isinstance(x, Value)]
    values = [x for x in operation.inputs if isinstance(x, Value)]
    same = len(values) == 1 and values[0].shape == operation.outputs[0].shape
    return numbers[0] if same and numbers else None


def _number(operand: Operand) -> float | None:
    if not isinstance(operand, Constant) or np.size(operand.array) != 1:
        return None
    return float(np.asarray(operand.array).reshape(()))
