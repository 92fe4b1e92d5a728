"""Products of an input with a weight: layers, as far as a graph knows of them.

What follows such a product channel by channel belongs to it: `ab_jax.export.traced.folding` makes
scales and shifts a part of the weight and one bias, and `endings` tells which products end in a
bias and codes, so that a runtime may compute all of these at once.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from ab_jax.export.traced.traced_graph import (
    Codes,
    Constant,
    Graph,
    Operand,
    Operation,
    Users,
    Value,
)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedProduct:
    """A convolution or a product of matrices one of whose operands is a weight.

    Attributes:
      operation: `conv_general_dilated` or `dot_general`.
      side: which of its operands is the weight.
      channels: for each axis of its output that the weight gives, the axis of the weight.
    """

    operation: Operation
    side: int
    channels: Mapping[int, int]

    @property
    def weight(self) -> Codes | Constant:
        """The weight."""
        weight = self.operation.inputs[self.side]
        assert not isinstance(weight, Value)
        return weight

    @property
    def output(self) -> Value:
        """What the product gives out."""
        return self.operation.outputs[0]

    def by_channel(self, operand: Operand) -> np.ndarray | None:
        """A constant that has one number for each channel of the output, or one for all.

        Returns:
          It in as many axes as the output, those of other sizes than 1 being channels; None: it is
          no such constant.
        """
        shape = self.output.shape
        if not isinstance(operand, Constant) or operand.dtype != self.output.dtype:
            return None
        array = np.asarray(operand.array)
        array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        fits = all(
            size == 1 or (axis in self.channels and size == shape[axis])
            for axis, size in enumerate(array.shape)
        )
        return array if fits else None

    def channel_sizes(self) -> list[int]:
        """The shape of one number a channel, in as many axes as the output."""
        sizes = [1] * len(self.output.shape)
        for axis, own in self.channels.items():
            sizes[axis] = self.weight.shape[own]
        return sizes

    def for_weight(self, by_channel: np.ndarray) -> np.ndarray:
        """Numbers of each channel of the output in as many axes as the weight."""
        shape = [1] * len(self.weight.shape)
        for axis, own in self.channels.items():  # in the same order here and there
            shape[own] = by_channel.shape[axis]
        return by_channel.reshape(shape)


def weighted_product(operation: Operation) -> WeightedProduct | None:
    """The operation as a product with a weight; None: it is none."""
    if len(operation.inputs) != 2:
        return None
    left, right = operation.inputs
    if operation.primitive == "conv_general_dilated":
        numbers = operation.params["dimension_numbers"]
        if isinstance(right, Value) or operation.params["batch_group_count"] != 1:
            return None
        return WeightedProduct(operation, 1, {numbers.out_spec[1]: numbers.rhs_spec[0]})
    if operation.primitive == "dot_general" and isinstance(left, Value) != isinstance(right, Value):
        side = int(isinstance(left, Value))
        contracted, batch = operation.params["dimension_numbers"]
        if batch[side]:
            return None
        weight = operation.inputs[side]
        free = [axis for axis in range(len(weight.shape)) if axis not in contracted[side]]
        first = len(operation.outputs[0].shape) - len(free) if side else 0
        return WeightedProduct(operation, side, {first + i: axis for i, axis in enumerate(free)})
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Ending:
    """What directly follows a product, and is all that becomes of it.

    Attributes:
      bias: a number for each channel, in as many axes as the output; None: there is none.
      add: the operation that adds it.
      quantize: the operation that makes codes of the product, or of the sum; None: there is none.
    """

    bias: np.ndarray | None
    add: Operation | None
    quantize: Operation | None

    @property
    def operations(self) -> list[Operation]:
        """Those that there are."""
        return [operation for operation in (self.add, self.quantize) if operation is not None]


def endings(graph: Graph) -> dict[Operation, Ending]:
    """The products with a weight that a bias or codes follow."""
    users = Users(graph)
    found = {}
    for operation in graph.operations:
        product = weighted_product(operation)
        if product is None:
            continue
        bias, add, following = None, None, users.only(product.output)
        if following is not None and following.primitive == "add":
            others = [x for x in following.inputs if x is not product.output]
            bias = product.by_channel(others[0]) if others else None
            if bias is not None:
                bias = np.broadcast_to(bias, product.channel_sizes())
                add, following = following, users.only(following.outputs[0])
        if following is None or following.primitive != "quantize":
            following = None
        if add is not None or following is not None:
            found[operation] = Ending(bias, add, following)
    return found
