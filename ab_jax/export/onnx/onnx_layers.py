"""Layers with weights in an ONNX file, in the form that ONNX Runtime computes fastest.

Which forms there are, and why, stands in `ab_jax.export.onnx`.
"""

import dataclasses
import math

import numpy as np
from onnx import TensorProto

from ab_jax.export.graph.operations import Convolution, Dense, shape_of
from ab_jax.export.onnx.onnx_file import OnnxFile
from ab_jax.export.onnx.onnx_weights import (
    bias_values,
    float_array,
    float_weights,
    of_channels,
    weight_values,
)
from ab_jax.quantizers import Quantized

_LARGEST_CODE = 255  # of an input
# Of kernels larger than 1 x 1 whose convolution is one product of matrices.
_MOST_PLACES = 9
_FEWEST_CHANNELS = 8
_FAR = 2**63 - 1  # past the end of any axis


@dataclasses.dataclass(frozen=True)
class Codes:
    """uint8 codes in the file: their name, and what their values are made by."""

    name: str
    scale: np.ndarray  # float32 scalar
    zero_point: np.uint8
    arrays: tuple[str, str]  # names of the two


@dataclasses.dataclass
class Value:
    """A value of the network in the file, channels first: floats, codes or both.

    Attributes:
      shape: as the graph has it, channels last, without the batch.
      name: of the floats; None until someone asks for those of codes.
      codes: None where it is not quantized.
      order: of features that were flattened here, channels first: at each place the place it has in
        the graph. None: as there.
    """

    shape: tuple[int, ...]
    name: str | None
    codes: Codes | None = None
    order: np.ndarray | None = None

    def floats(self, file: OnnxFile) -> str:
        """The name of the floats.

        Of codes without DequantizeLinear: where ONNX Runtime sees that before a layer and
        QuantizeLinear after it, it rounds the layer's float32 weights to 8 bits by itself.
        """
        if self.name is None:
            assert self.codes is not None, "floats or codes"
            stored, zero_point = self.codes.name, np.float32(self.codes.zero_point)
            x = file.node("Cast", [stored], f"{stored}_float", to=TensorProto.FLOAT)
            if zero_point:
                x = file.node("Sub", [x, file.constant(zero_point)], f"{stored}_offset")
            self.name = file.node("Mul", [x, self.codes.arrays[0]], f"{stored}_value")
        return self.name

    def by_channel(self, values: np.ndarray) -> np.ndarray:
        """Numbers [channels], or [features], in the shape and the order of this value."""
        if len(self.shape) > 1:
            return values.reshape(-1, 1, 1)
        return values if self.order is None else values[self.order]


def add_layer(
    file: OnnxFile,
    name: str,
    layer: Convolution | Dense,
    x: Value,
    shape: tuple[int, ...],
    *,
    to_codes: bool,
    int4: bool,
    integer_bias: bool,
) -> Value:
    """Add a layer to the file; returns what it gives out.

    Args:
      file: where to.
      name: of the layer.
      layer: its weights and numbers.
      x: its input.
      shape: of what it gives out.
      to_codes: whether codes are all that is wanted of it.
      int4: whether codes of at most 4 bits are stored as int4.
      integer_bias: whether the bias of a convolution may be rounded, for codes without floats.
    """
    weights = layer.kernel
    if not isinstance(weights, Quantized):
        return Value(shape, _in_floats(file, name, layer, x, int4=False))
    int4 = int4 and weights.bits <= 4
    if x.codes is None or not _is_by_channel(weights):
        return Value(shape, _in_floats(file, name, layer, x, int4))
    if isinstance(layer, Dense):
        return Value(shape, _dense(file, name, layer, weights, x, int4))
    if integer_bias and to_codes and weights.zero_point is None:
        bias = _whole_bias(layer, x.codes)
        if bias is not None:
            y = _between_codes(file, name, layer, weights, x.codes, bias, int4)
            return Value(shape, y)
    if _is_worth_a_product(layer):
        return Value(shape, _product(file, name, layer, weights, x.codes, int4))
    return Value(shape, _in_floats(file, name, layer, x, int4))


def strided(file: OnnxFile, x: str, name: str, stride: tuple[int, int]) -> str:
    """The name of every so-many-th position of an image, channels first."""
    if stride == (1, 1):
        return x
    starts, ends, axes = (0, 0), (_FAR, _FAR), (2, 3)
    cut = [file.constant(np.array(part, np.int64)) for part in (starts, ends, axes, stride)]
    return file.node("Slice", [x, *cut], f"{name}/strided")


def _between_codes(
    file: OnnxFile,
    name: str,
    layer: Convolution,
    weights: Quantized,
    x: Codes,
    bias: np.ndarray,
    int4: bool,
) -> str:
    kernel = np.transpose(np.asarray(weights.codes), (3, 2, 0, 1))
    stored, scale = weight_values(file, name, weights, kernel, axis=0, int4=int4)
    inputs = [_values(file, x), stored]
    if bias.size:
        inputs.append(bias_values(file, name, bias, x.scale * scale))
    return _convolution(file, name, layer, inputs)


def _dense(
    file: OnnxFile, name: str, layer: Dense, weights: Quantized, x: Value, int4: bool
) -> str:
    """A product of matrices, with an axis too many.

    Of two axes ONNX Runtime makes a Gemm first, and then rounds the bias to an integer by itself.
    """
    assert x.codes is not None
    axis = file.constant(np.array([1]))
    rows = file.node("Unsqueeze", [x.codes.name, axis], f"{name}/row")
    kernel = np.asarray(weights.codes)
    if x.order is not None:
        kernel = kernel[x.order]
    stored, _ = weight_values(file, name, weights, kernel, axis=1, int4=int4)
    inputs = [_values(file, dataclasses.replace(x.codes, name=rows)), stored]
    y = _plus_bias(file, name, file.node("MatMul", inputs, f"{name}/product"), layer)
    return file.node("Squeeze", [y, axis], f"{name}/features")


def _product(
    file: OnnxFile, name: str, layer: Convolution, weights: Quantized, x: Codes, int4: bool
) -> str:
    """A convolution as one product of matrices, with the channels last.

    A row is what the kernel covers at one position: for kernels larger than 1 x 1 a copy of the
    codes by place of the kernel, which costs little beside the product.
    """
    codes = np.asarray(weights.codes)
    height, width, channels, features = codes.shape
    last = file.node("Transpose", [x.name], f"{name}/channels_last", perm=[0, 2, 3, 1])
    (top, bottom), (left, right) = layer.padding
    if any((top, bottom, left, right)):
        amounts = file.constant(np.array([0, top, left, 0, 0, bottom, right, 0]))
        padded = [last, amounts, file.constant(x.zero_point)]
        last = file.node("Pad", padded, f"{name}/padded")
    places = [
        _window(file, last, name, (i, j), (height, width), layer.strides)
        for i in range(height)
        for j in range(width)
    ]
    rows = places[0]
    if len(places) > 1:
        rows = file.node("Concat", places, f"{name}/rows", axis=3)
    kernel = codes.reshape(height * width * channels, features)
    stored, _ = weight_values(file, name, weights, kernel, axis=1, int4=int4)
    inputs = [_values(file, dataclasses.replace(x, name=rows)), stored]
    y = _plus_bias(file, name, file.node("MatMul", inputs, f"{name}/product"), layer)
    return file.node("Transpose", [y], f"{name}/channels_first", perm=[0, 3, 1, 2])


def _window(
    file: OnnxFile,
    x: str,
    name: str,
    place: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
) -> str:
    """The name of what one place of a kernel sees, channels last."""
    if kernel == (1, 1) and strides == (1, 1):
        return x
    # Up to the last position of this place: the places after it do not reach the border.
    ends = [p - (k - 1) if p < k - 1 else _FAR for p, k in zip(place, kernel, strict=True)]
    cut = [file.constant(np.array(part, np.int64)) for part in (place, ends, (1, 2), strides)]
    return file.node("Slice", [x, *cut], f"{name}/place_{place[0]}_{place[1]}")


def _in_floats(file: OnnxFile, name: str, layer: Convolution | Dense, x: Value, int4: bool) -> str:
    inputs = [x.floats(file)]
    if isinstance(layer, Convolution):
        inputs.append(float_weights(file, name, layer.kernel, (3, 2, 0, 1), None, int4))
        if layer.bias is not None:
            inputs.append(float_array(file, f"{name}/bias", layer.bias))
        return _convolution(file, name, layer, inputs)
    inputs.append(float_weights(file, name, layer.kernel, (0, 1), x.order, int4))
    return _plus_bias(file, name, file.node("MatMul", inputs, f"{name}/product"), layer)


def _plus_bias(file: OnnxFile, name: str, y: str, layer: Convolution | Dense) -> str:
    if layer.bias is None:
        return y
    return file.node("Add", [y, float_array(file, f"{name}/bias", layer.bias)], f"{name}/biased")


def _convolution(file: OnnxFile, name: str, layer: Convolution, inputs: list[str]) -> str:
    (top, bottom), (left, right) = layer.padding
    return file.node(
        "Conv",
        inputs,
        name,
        kernel_shape=shape_of(layer.kernel)[:2],
        strides=layer.strides,
        pads=[top, left, bottom, right],
        group=layer.groups,
    )


def _values(file: OnnxFile, codes: Codes) -> str:
    return file.node("DequantizeLinear", [codes.name, *codes.arrays], f"{codes.name}_value")


def _whole_bias(layer: Convolution, x: Codes) -> np.ndarray | None:
    """The bias in units of the products, int32 [channels], or empty; None where it does not fit."""
    if layer.bias is None:
        return np.zeros(0, np.int32)
    weights = layer.kernel
    assert isinstance(weights, Quantized)
    codes = np.abs(np.asarray(weights.codes, np.int64)).reshape(-1, shape_of(weights)[-1])
    unit = (x.scale * of_channels(weights.scale, codes.shape[-1])).astype(np.float64)
    if not unit.min() > 0:  # a channel that batch norm multiplies by 0
        return None
    whole = np.rint(np.asarray(layer.bias, np.float64) / unit)
    largest = np.abs(whole) + _LARGEST_CODE * codes.sum(axis=0)
    return whole.astype(np.int32) if largest.max() < 2**31 else None


def _is_by_channel(weights: Quantized) -> bool:
    """Whether there is a scale a tensor, or an output channel."""
    shape = weights.scale.shape
    return all(count == 1 for count in shape[:-1]) and shape[-1] in (1, weights.codes.shape[-1])


def _is_worth_a_product(layer: Convolution) -> bool:
    """Whether the copies of codes are few, and of runs of channels that are long enough."""
    *places, channels, _ = shape_of(layer.kernel)
    few = math.prod(places) <= _MOST_PLACES and channels >= _FEWEST_CHANNELS
    return layer.groups == 1 and (few or math.prod(places) == 1)
