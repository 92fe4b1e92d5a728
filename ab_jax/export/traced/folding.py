"""Scales and shifts by channel that follow a product, as a part of its weight and one bias.

Batch norm at inference is such: where it directly follows a layer,
`(codes * scale) * gamma + shift` is `codes * (scale * gamma) + shift`. A negative gamma negates the
codes of its channel, so that scales stay positive; they are otherwise as training left them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import lax

from ab_jax.export.traced.traced_graph import (
    Codes,
    Constant,
    Graph,
    Operand,
    Operation,
    Users,
    Value,
)
from ab_jax.export.traced.weighted_products import WeightedProduct, weighted_product

_FOLDED = {"add", "sub", "mul", "div", "neg"}
_DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}


def fold_affine(graph: Graph) -> Graph:
    """The graph with each product's scales and shifts in its weight, and in one sum behind it.

    What it computes differs by rounding alone. A weight that other kinds of operations take too,
    such as an embedding, stays as it is, since it would lie in a file twice.
    """
    users = Users(graph)
    taken_by = _kinds_of_users(graph)
    folded: dict[Operation, list[Operation]] = {}
    for operation in graph.operations:
        product = weighted_product(operation)
        if product is None or product.output.dtype not in _DTYPES:
            continue
        weight = product.weight
        if weight.dtype != product.output.dtype or len(taken_by.get(weight.path, ())) > 1:
            continue
        chain, factor, shift = _what_follows(product, users)
        if not chain or [part.primitive for part in chain] == ["add"]:
            continue
        written = _with(product, chain[-1].outputs[0], factor, shift)
        if written is not None:
            folded |= {part: [] for part in chain} | {operation: written}
    return graph.rewritten(folded)


def _what_follows(
    product: WeightedProduct, users: Users
) -> tuple[list[Operation], np.ndarray, np.ndarray]:
    """The operations to fold, and what they come to: a factor and a shift, in float64."""
    value = product.output
    factor, shift = (np.full((1,) * len(value.shape), number, np.float64) for number in (1, 0))
    chain: list[Operation] = []
    while (following := users.only(value)) is not None and following.primitive in _FOLDED:
        first = following.inputs[0] is value
        array = np.zeros(())
        if following.primitive != "neg":
            other = product.by_channel(following.inputs[1 if first else 0])
            if other is None or (following.primitive == "div" and not first):
                break
            array = other.astype(np.float64)
        match following.primitive:
            case "neg":
                factor, shift = -factor, -shift
            case "add":
                shift = shift + array
            case "sub":
                sign = 1 if first else -1
                factor, shift = sign * factor, sign * (shift - array)
            case "mul":
                factor, shift = factor * array, shift * array
            case "div":
                factor, shift = factor / array, shift / array
        chain.append(following)
        value = following.outputs[0]
    return chain, factor, shift


def _with(
    product: WeightedProduct, result: Value, factor: np.ndarray, shift: np.ndarray
) -> list[Operation] | None:
    """The product and the sum behind it, which gives the result; None: codes have no room."""
    weight = times(product.weight, product.for_weight(factor))
    if weight is None or not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        return None
    operation = product.operation
    inputs = list(operation.inputs)
    inputs[product.side] = weight
    if not shift.any():
        return [dataclasses.replace(operation, inputs=tuple(inputs), outputs=(result,))]
    array = np.broadcast_to(shift, product.channel_sizes()).astype(result.dtype)
    bias = Constant(array, weight.path)
    add = Operation("add", {}, (product.output, bias), (result,), operation.line, lax.add_p)
    return [dataclasses.replace(operation, inputs=tuple(inputs)), add]


def times(weight: Codes | Constant, factor: np.ndarray) -> Codes | Constant | None:
    """The weight times numbers, in as many axes or one for all; None: a code has no negative."""
    if isinstance(weight, Constant):
        array = (np.asarray(weight.array, np.float64) * factor).astype(weight.dtype)
        return Constant(array, weight.path)
    if len(weight.scales) > 1:
        return dataclasses.replace(weight, scales=tuple(_product(s, factor) for s in weight.scales))
    negative = np.broadcast_to(factor < 0, weight.shape)
    codes, zeros = weight.codes, weight.zero_point
    if zeros is not None:
        # The complement, -1 - c, negates the difference of the two and stays within their range,
        # which has one negative number more than positive ones.
        codes, zeros = np.where(negative, ~codes, codes), np.where(negative, ~zeros, zeros)
    elif negative.any():
        if weight.bits > 1 and (codes[negative] == -(2 ** (weight.bits - 1))).any():
            return None
        codes = np.where(negative, -codes, codes)
    scales = (_product(weight.scales[0], np.abs(factor)),)
    return dataclasses.replace(weight, codes=codes, scales=scales, zero_point=zeros)


def _product(scale: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return (scale.astype(np.float64) * factor).astype(scale.dtype)


def _kinds_of_users(graph: Graph) -> dict[str | None, set[str]]:
    """By the path of a weight, the primitives that take it, or a part of it."""
    found: dict[str | None, set[str]] = {}

    def note(operands: Sequence[Operand], primitive: str) -> None:
        for operand in operands:
            if not isinstance(operand, Value) and operand.path:
                found.setdefault(operand.path, set()).add(primitive)

    for operation in graph.all_operations():
        note(operation.inputs, operation.primitive)
    note(graph.outputs, "output")
    return found
