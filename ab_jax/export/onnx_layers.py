"""Layers with weights in an ONNX file, in the form that ONNX Runtime computes fastest.

Which forms there are, and why, stands in `ab_jax.export.onnx`.
"""

import dataclasses

import numpy as np
from onnx import TensorProto

from ab_jax.export.graph import Convolution, Dense, Weights, shape_of
from ab_jax.export.onnx_file import OnnxFile
from ab_jax.quantizers import Quantized

_LARGEST_CODE = 255  # of an input
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
    """
    weights = layer.kernel
    if isinstance(weights, Quantized):
        int4 = int4 and weights.bits <= 4
        if x.codes is not None and _is_by_channel(weights):
            if isinstance(layer, Dense):
                return Value(shape, _dense(file, name, layer, weights, x, int4))
            if to_codes and weights.zero_point is None:
                bias = _whole_bias(layer, x.codes)
                if bias is not None:
                    y = _between_codes(file, name, layer, weights, x.codes, bias, int4)
                    return Value(shape, y)
            if _is_pointwise(layer):
                return Value(shape, _pointwise(file, name, layer, weights, x.codes, int4))
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
    stored, scale = _weights(file, name, weights, kernel, axis=0, int4=int4)
    inputs = [_values(file, x), stored]
    if bias.size:
        inputs.append(_bias_values(file, name, bias, x.scale * scale))
    return _convolution(file, name, layer, inputs)


def _dense(
    file: OnnxFile, name: str, layer: Dense, weights: Quantized, x: Value, int4: bool
) -> str:
    assert x.codes is not None
    kernel = np.asarray(weights.codes)
    if x.order is not None:
        kernel = kernel[x.order]
    stored, scale = _weights(file, name, weights, kernel, axis=1, int4=int4)
    inputs = [_values(file, x.codes), stored]
    bias = _whole_bias(layer, x.codes)
    if bias is None:
        return _plus_bias(file, name, file.node("MatMul", inputs, f"{name}/product"), layer)
    if bias.size:
        inputs.append(_bias_values(file, name, bias, x.codes.scale * scale))
    return file.node("Gemm", inputs, name, alpha=1.0, beta=1.0)


def _pointwise(
    file: OnnxFile, name: str, layer: Convolution, weights: Quantized, x: Codes, int4: bool
) -> str:
    """A 1 x 1 convolution as a product, with the channels last."""
    cut = strided(file, x.name, name, layer.strides)
    last = file.node("Transpose", [cut], f"{name}/channels_last", perm=[0, 2, 3, 1])
    kernel = np.asarray(weights.codes)[0, 0]
    stored, _ = _weights(file, name, weights, kernel, axis=1, int4=int4)
    inputs = [_values(file, dataclasses.replace(x, name=last)), stored]
    y = _plus_bias(file, name, file.node("MatMul", inputs, f"{name}/product"), layer)
    return file.node("Transpose", [y], f"{name}/channels_first", perm=[0, 3, 1, 2])


def _in_floats(file: OnnxFile, name: str, layer: Convolution | Dense, x: Value, int4: bool) -> str:
    inputs = [x.floats(file)]
    if isinstance(layer, Convolution):
        inputs.append(_float_weights(file, name, layer.kernel, (3, 2, 0, 1), None, int4))
        if layer.bias is not None:
            inputs.append(_float_array(file, f"{name}/bias", layer.bias))
        return _convolution(file, name, layer, inputs)
    inputs.append(_float_weights(file, name, layer.kernel, (0, 1), x.order, int4))
    return _plus_bias(file, name, file.node("MatMul", inputs, f"{name}/product"), layer)


def _plus_bias(file: OnnxFile, name: str, y: str, layer: Convolution | Dense) -> str:
    if layer.bias is None:
        return y
    return file.node("Add", [y, _float_array(file, f"{name}/bias", layer.bias)], f"{name}/biased")


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


def _bias_values(file: OnnxFile, name: str, bias: np.ndarray, unit: np.ndarray) -> str:
    arrays = [
        file.array(f"{name}/bias", bias),
        file.array(f"{name}/bias_scale", unit),
        file.array(f"{name}/bias_zero_point", np.zeros(bias.shape, np.int32)),
    ]
    return file.node("DequantizeLinear", arrays, f"{name}/bias_value", axis=0)


def _weights(
    file: OnnxFile, name: str, weights: Quantized, codes: np.ndarray, *, axis: int, int4: bool
) -> tuple[str, np.ndarray]:
    """The name of the weights' values, their codes arranged with the channels along an axis.

    And their scales [channels].
    """
    channels = codes.shape[axis]
    scale = _of_channels(weights.scale, channels)
    zeros: object = np.int8(0) if weights.zero_point is None else weights.zero_point
    arrays = [
        file.whole_numbers(f"{name}/kernel", codes, int4=int4),
        file.array(f"{name}/kernel_scale", scale),
        file.array(f"{name}/kernel_zero_point", _of_channels(zeros, channels)),
    ]
    return file.node("DequantizeLinear", arrays, f"{name}/kernel_value", axis=axis), scale


def _float_weights(
    file: OnnxFile,
    name: str,
    weights: Weights,
    axes: tuple[int, ...],
    order: np.ndarray | None,
    int4: bool,
) -> str:
    """The name of the weights' values with their axes so, and the rows of a dense kernel in order.

    No DequantizeLinear, which ONNX Runtime would compute anew for every batch of images.
    """
    shape = shape_of(weights)

    def arranged(values: np.ndarray) -> np.ndarray:
        rows = values if order is None or values.shape[0] == 1 else values[order]
        return np.ascontiguousarray(rows.transpose(axes))

    def expanded(values: np.ndarray) -> np.ndarray:
        for i, (count, size) in enumerate(zip(values.shape, shape, strict=True)):
            if count not in (1, size):  # by blocks
                values = np.repeat(values, size // count, axis=i)
        return arranged(values.astype(np.float32))

    if not isinstance(weights, Quantized):
        return file.array(f"{name}/kernel", arranged(np.asarray(weights, np.float32)))
    codes = arranged(np.asarray(weights.codes))
    stored = file.whole_numbers(f"{name}/kernel", codes, int4=int4)
    values = file.node("Cast", [stored], f"{name}/kernel_codes", to=TensorProto.FLOAT)
    if weights.zero_point is not None:
        zero_point = expanded(np.asarray(weights.zero_point))
        zeros = file.array(f"{name}/kernel_zero_point", zero_point)
        values = file.node("Sub", [values, zeros], f"{name}/kernel_offsets")
    scale = file.array(f"{name}/kernel_scale", expanded(np.asarray(weights.scale)))
    return file.node("Mul", [values, scale], f"{name}/kernel_value")


def _whole_bias(layer: Convolution | Dense, x: Codes) -> np.ndarray | None:
    """The bias in units of the products, int32 [channels], or empty; None where it does not fit."""
    if layer.bias is None:
        return np.zeros(0, np.int32)
    weights = layer.kernel
    assert isinstance(weights, Quantized)
    codes = np.abs(np.asarray(weights.codes, np.int64)).reshape(-1, shape_of(weights)[-1])
    unit = (x.scale * _of_channels(weights.scale, codes.shape[-1])).astype(np.float64)
    if not unit.min() > 0:  # a channel that batch norm multiplies by 0
        return None
    whole = np.rint(np.asarray(layer.bias, np.float64) / unit)
    largest = np.abs(whole) + _LARGEST_CODE * codes.sum(axis=0)
    return whole.astype(np.int32) if largest.max() < 2**31 else None


def _is_by_channel(weights: Quantized) -> bool:
    """Whether there is a scale a tensor, or an output channel."""
    shape = weights.scale.shape
    return all(count == 1 for count in shape[:-1]) and shape[-1] in (1, weights.codes.shape[-1])


def _is_pointwise(layer: Convolution) -> bool:
    plain = layer.padding == ((0, 0), (0, 0)) and layer.groups == 1
    return plain and shape_of(layer.kernel)[:2] == (1, 1)


def _of_channels(values: object, channels: int) -> np.ndarray:
    """Scales or zero points as an array [channels]."""
    array = np.asarray(values).reshape(-1)
    array = array if array.dtype == np.int8 else array.astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(array, (channels,)))


def _float_array(file: OnnxFile, name: str, values: object) -> str:
    return file.array(name, np.asarray(values, np.float32))
