"""Convolutions of codes with codes, in the forms of which ONNX Runtime makes kernels of integers.

- A product of matrices with the channels last, up to 3 x 3 but depthwise: ONNX Runtime makes it
  MatMulIntegerToFloat. A row is what the kernel covers at one position: for kernels larger than
  1 x 1 a copy of the codes by place of the kernel, which costs little beside the product.
- Where biases may be rounded and nothing but codes is wanted, the convolution as a whole:
  QLinearConv, whose bias is an int32 in units of the products. Codes of few bits are multiplied by
  a power of two, and their scales divided by it: smaller units, and biases that are less rounded.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from ab_jax.export.onnx.function_file import FAR, FunctionFile, QuantizedName
from ab_jax.export.onnx.function_weights import Stored, stored
from ab_jax.export.traced import Codes, Ending, Operation, Value

_LARGEST_CODE = 255  # of an input
# Of kernels larger than 1 x 1 whose convolution is one product of matrices.
_MOST_PLACES = 9
_FEWEST_CHANNELS = 8


class Written(NamedTuple):
    """What was written: the name, and which axis of the output each of its axes is."""

    name: str
    axes: tuple[int, ...]


def in_integers(file: FunctionFile, operation: Operation) -> Written | None:
    """A convolution of codes with its bias; None: there is no kernel of integers for it."""
    x, kernel = operation.inputs
    params = operation.params
    if not isinstance(kernel, Codes) or not isinstance(x, Value) or x not in file.quantized:
        return None
    pads = [end for ends in params["padding"] for end in ends]
    if any(factor != 1 for factor in params["lhs_dilation"]) or min(pads, default=0) < 0:
        return None
    rhs = tuple(params["dimension_numbers"].rhs_spec)
    if kernel.dtype != np.float32 or operation.outputs[0].dtype != np.float32:
        return None
    first = kernel.moved(lambda w: w.transpose(rhs))  # channels out, channels in, places
    weight = stored(first)
    if len(weight.scales) > 1 or weight.scales[0].size not in (1, weight.scales[0].shape[0]):
        return None
    codes, ending = file.quantized[x], file.ending(operation)
    if file.integer_biases and ending is not None and ending.quantize is not None:
        bias = _whole_bias(weight, ending, codes)
        if bias is not None:
            name = _between_codes(file, operation, weight, codes, bias)
            return Written(name, tuple(params["dimension_numbers"].out_spec))
    if params["feature_group_count"] == 1 and _is_worth_a_product(first):
        return _product(file, operation, first, codes, ending)
    return None


def _between_codes(
    file: FunctionFile, operation: Operation, weight: Stored, x: QuantizedName, bias: np.ndarray
) -> str:
    params = operation.params
    numbers = params["dimension_numbers"]
    data = file.transpose(x.codes, numbers.lhs_spec)
    inputs = [
        file.op("DequantizeLinear", data, x.scale, x.zero_point),
        file.weight(weight.weight, channels=0, finer=True),
    ]
    if bias.size:
        path = weight.weight.path
        unit = x.unit * weight.scales[0].reshape(-1) / weight.room().astype(np.float32)
        arrays = {"bias": bias, "bias_scale": unit, "bias_zero_point": np.zeros_like(bias)}
        names = [file.own_array(f"{path}/{name}", array) for name, array in arrays.items()]
        inputs.append(file.op("DequantizeLinear", *names, axis=0))
    return file.op(
        "Conv",
        *inputs,
        kernel_shape=weight.weight.shape[2:],
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=[ends[i] for i in (0, 1) for ends in params["padding"]],
    )


def _product(
    file: FunctionFile,
    operation: Operation,
    weight: Codes,
    x: QuantizedName,
    ending: Ending | None,
) -> Written:
    """A product of matrices, with the channels last."""
    params = operation.params
    numbers = params["dimension_numbers"]
    out, channels, *window = weight.shape
    data = file.transpose(
        x.codes, [numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]]
    )
    pads = params["padding"]
    if any(map(any, pads)):
        ends = [0, *(start for start, _ in pads), 0, 0, *(end for _, end in pads), 0]
        data = file.op("Pad", data, np.array(ends, np.int64), x.zero_point)
    steps = list(zip(window, params["window_strides"], params["rhs_dilation"], strict=True))
    rows = [_place(file, data, at, steps) for at in itertools.product(*map(range, window))]
    data = rows[0] if len(rows) == 1 else file.op("Concat", *rows, axis=len(window) + 1)
    rows_in = math.prod(window) * channels
    matrix = weight.moved(lambda w: np.moveaxis(w, (0, 1), (-1, -2)).reshape(rows_in, out))
    codes = file.op("DequantizeLinear", data, x.scale, x.zero_point)
    name = file.op("MatMul", codes, file.weight(matrix, channels=1))
    if ending is not None and ending.bias is not None:
        name = file.op("Add", name, file.array(f"{file.stem}/bias", ending.bias.reshape(-1)))
    spec = numbers.out_spec
    return Written(name, (spec[0], *spec[2:], spec[1]))


def _place(
    file: FunctionFile, x: str, place: tuple[int, ...], steps: list[tuple[int, int, int]]
) -> str:
    """The name of what one place of a kernel sees, channels last.

    `steps` are size, stride and dilation of the kernel, by axis.
    """
    for axis, (at, (size, stride, dilation)) in enumerate(zip(place, steps, strict=True), 1):
        if (size, stride) != (1, 1):
            # Up to the last position of this place: the places after it do not reach the border.
            behind = (size - 1 - at) * dilation
            x = file.slice(x, axis, at * dilation, -behind if behind else FAR, stride)
    return x


def _whole_bias(weight: Stored, ending: Ending, x: QuantizedName) -> np.ndarray | None:
    """The bias in units of the products, int32 [channels], or empty; None where it does not fit."""
    if weight.zero_point is not None:
        return None
    if ending.bias is None:
        return np.zeros(0, np.int32)
    room = weight.room()
    codes = np.abs(weight.weight.codes.astype(np.int64)).reshape(len(room), -1) * room[:, None]
    unit = (x.unit * weight.scales[0].reshape(-1)).astype(np.float64) / room
    if not unit.min() > 0:  # a channel that batch norm multiplies by 0
        return None
    whole = np.rint(ending.bias.reshape(-1).astype(np.float64) / unit)
    largest = np.abs(whole) + _LARGEST_CODE * codes.sum(axis=1)
    return whole.astype(np.int32) if largest.max() < 2**31 else None


def _is_worth_a_product(weight: Codes) -> bool:
    """Whether the copies of codes are few, and of runs of channels that are long enough."""
    _, channels, *places = weight.shape
    few = math.prod(places) <= _MOST_PLACES and channels >= _FEWEST_CHANNELS
    return few or math.prod(places) == 1
