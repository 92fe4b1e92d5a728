"""Layers, products with a weight, as LiteRT's operators: on int8 codes where that is possible.

Where a layer's input is quantized and its output is again, directly or through a ReLU or ReLU6, it
is an integer operator from int8 codes to int8 codes. LiteRT has no operator that gives the integer
sum as it is, so that a layer whose output the function keeps in float is a float operator on the
numbers that codes stand for.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ab_jax.export.litert.flatbuffer import Scales
from ab_jax.export.litert.litert_endings import LitertEnding
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_integers import Integers, activation_scales, integers
from ab_jax.export.litert.litert_tensors import Tensor
from ab_jax.export.litert.litert_weights import weight_values
from ab_jax.export.traced import Codes, Constant, Operand, Operation

#: Appends the operator: from input, kernel and bias to a result of these scales, None in floats,
#: clipped by the activation of this number.
Call = Callable[[Sequence[Tensor], Scales | None, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A product with a weight, as an operator takes it.

    Attributes:
      operation: the product.
      x: its input.
      arranged: puts the input's axes where the operator has them.
      weight: with the channels out last, in one axis.
      stored: the order of its axes in the file.
      call: appends the operator.
      back: puts the axes of the result where the product has them.
      is_whole: whether there is such an operator on int8.
    """

    operation: Operation
    x: Operand
    arranged: Callable[[Tensor], Tensor]
    weight: Codes | Constant
    stored: Sequence[int]
    call: Call
    back: Callable[[Tensor], Tensor]
    is_whole: bool = True

    @property
    def axis(self) -> int:
        """Where the channels out lie in the file."""
        return list(self.stored).index(len(self.stored) - 1)


def write_layer(file: LitertFile, layer: Layer) -> None:
    """Write a layer with what follows it, as far as its operator does that too."""
    operation = layer.operation
    ending = file.endings.get(operation)
    if ending is None:  # not of float32
        ending = LitertEnding(None, 0, operation.outputs[0], None, ())
    file.written.update(ending.operations)
    if ending.quantize is not None and _in_integers(file, layer, ending):
        file.written.add(ending.quantize)
        return
    if layer.x in file.codes:
        x = file.floats(layer.arranged(file.codes[layer.x]), np.float32)
    else:
        x = file.cast(layer.arranged(file.tensor(layer.x)), np.float32)
    bias = ending.bias
    if bias is None:  # XNNPACK wants one
        bias = np.zeros(layer.weight.shape[-1])
    named = layer.weight.path or file.stem
    bias = bias.astype(np.float32)
    inputs = [x, _values(file, layer), file.array(bias, f"{named}/bias", shared=False)]
    result = layer.back(layer.call(inputs, None, ending.activation))
    file.tensors[ending.value] = file.cast(result, ending.value.dtype)


def _values(file: LitertFile, layer: Layer) -> Tensor:
    weight, stored = layer.weight, layer.stored
    if isinstance(weight, Codes):
        moved = weight.moved(lambda w: w.transpose(stored))
        return file.cast(weight_values(file, moved, layer.axis), np.float32)
    array = np.asarray(weight.array, np.float32).transpose(stored)
    return file.array(array, weight.path or "")


def _in_integers(file: LitertFile, layer: Layer, ending: LitertEnding) -> bool:
    """Write the layer from codes to codes; False: that cannot be, and nothing is written."""
    quantize, weight = ending.quantize, layer.weight
    assert quantize is not None
    if not layer.is_whole or layer.x not in file.codes or not isinstance(weight, Codes):
        return False
    x, y = file.codes[layer.x], activation_scales(quantize)
    # Where codes may be negative, int8 has one below the lowest.
    if y is None or x.scales is None or quantize.params["quantizer"].signed:
        return False
    whole = integers(weight, ending.bias, x.scales, y)
    if whole is None:
        return False
    inputs = [layer.arranged(x), *_stored(file, layer, whole)]
    # Unsigned codes saturate at both ends as ReLU does, if int8 does not at the lower one.
    activation = ending.activation or _RELU
    file.stem = file.code_names[quantize]
    file.codes[quantize.outputs[0]] = layer.back(layer.call(inputs, y, activation))
    return True


_RELU = 1  # by the schema's number


def _stored(file: LitertFile, layer: Layer, whole: Integers) -> list[Tensor]:
    """Kernel and bias."""
    zeros = np.zeros(whole.scale.shape, np.int64)
    codes = np.ascontiguousarray(whole.codes.transpose(layer.stored))
    path = layer.weight.path
    return [
        file.array(codes, f"{path}/codes", Scales(whole.scale, zeros, layer.axis)),
        file.array(whole.bias, f"{path}/bias", Scales(whole.bias_scale, zeros), shared=False),
    ]
