"""Weights and biases of a layer as arrays of an ONNX file, and the names of their values."""

import numpy as np
from onnx import TensorProto

from ab_jax.export.graph.operations import Weights, shape_of
from ab_jax.export.onnx.onnx_file import OnnxFile
from ab_jax.quantizers import Quantized


def bias_values(file: OnnxFile, name: str, bias: np.ndarray, unit: np.ndarray) -> str:
    """The name of the values of a bias, int32 [channels], in units [channels]."""
    arrays = [
        file.array(f"{name}/bias", bias),
        file.array(f"{name}/bias_scale", unit),
        file.array(f"{name}/bias_zero_point", np.zeros(bias.shape, np.int32)),
    ]
    return file.node("DequantizeLinear", arrays, f"{name}/bias_value", axis=0)


def weight_values(
    file: OnnxFile, name: str, weights: Quantized, codes: np.ndarray, *, axis: int, int4: bool
) -> tuple[str, np.ndarray]:
    """The name of the weights' values, their codes arranged with the channels along an axis.

    And their scales [channels].
    """
    channels = codes.shape[axis]
    scale = of_channels(weights.scale, channels)
    zeros: object = np.int8(0) if weights.zero_point is None else weights.zero_point
    arrays = [
        file.whole_numbers(f"{name}/kernel", codes, int4=int4),
        file.array(f"{name}/kernel_scale", scale),
        file.array(f"{name}/kernel_zero_point", of_channels(zeros, channels)),
    ]
    return file.node("DequantizeLinear", arrays, f"{name}/kernel_value", axis=axis), scale


def float_weights(
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


def of_channels(values: object, channels: int) -> np.ndarray:
    """Scales or zero points as an array [channels]."""
    array = np.asarray(values).reshape(-1)
    array = array if array.dtype == np.int8 else array.astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(array, (channels,)))


def float_array(file: OnnxFile, name: str, values: object) -> str:
    """The name of an array, as float32."""
    return file.array(name, np.asarray(values, np.float32))
