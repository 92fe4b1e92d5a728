"""Convolutions, written into an ONNX file of a function.

Channels are first in ONNX. A convolution that is followed by a bias and by codes is written with
these, so that what is put in another order behind it are codes, a byte each.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FunctionFile, computed_in
from ab_jax.export.onnx.function_integers import in_integers
from ab_jax.export.onnx.function_layouts import padded_with
from ab_jax.export.onnx.function_products import add_codes, arranged, coded
from ab_jax.export.traced import Codes, Constant, Operand, Operation, Shape, Size, Value, times
from ab_jax.export.traced.carrying import NotCarriedError, check_padding

_MOST_AXES = 3  # of images: ONNX Runtime has kernels up to these


def _convolution(file: FunctionFile, operation: Operation) -> str:
    x, kernel = operation.inputs
    params = operation.params
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise NotCarriedError("with groups of the batch")
    if len(x.shape) > _MOST_AXES + 2 or len(x.shape) < 3:
        raise NotCarriedError(f"over {len(x.shape) - 2} axes")
    kind = computed_in(x.dtype)
    if not np.issubdtype(kind, np.floating):
        raise NotCarriedError(f"of {x.dtype}")
    lhs, rhs, out = (tuple(spec) for spec in numbers)
    shape = tuple(x.shape[i] for i in lhs)
    window = tuple(kernel.shape[i] for i in rhs)
    if any(isinstance(size, Size) for size in window):
        raise NotCarriedError("with a kernel whose size is open")
    check_padding(params["padding"])
    written = in_integers(file, operation)
    if written is not None:
        return _ended(file, operation, written.name, written.axes)
    data, kernel = _channels_first(file, operation, shape, kind)
    name = _transposed(file, operation, data, kernel, kind)
    if name is None:
        name = _direct(file, operation, data, shape, kernel, kind)
    elif operation in file.endings:
        name = _plus_bias(file, operation, name)
    if kind != operation.outputs[0].dtype:
        name = file.transpose(name, [out.index(i) for i in range(len(out))])
        return file.cast(name, kind, operation.outputs[0].dtype)
    return _ended(file, operation, name, out)


def _channels_first(
    file: FunctionFile, operation: Operation, shape: Shape, kind: np.dtype
) -> tuple[str, Operand]:
    """The name of an input with the channels first, and the kernel for it.

    The scale of codes becomes a part of the kernel. They are put in order as floats, which ONNX
    Runtime does together with the order that its own kernels want.
    """
    x, kernel = operation.inputs
    lhs = operation.params["dimension_numbers"].lhs_spec
    if x not in file.quantized or isinstance(kernel, Value) or kind != kernel.dtype:
        return arranged(file, x, lhs, shape, kind), kernel
    codes = file.quantized[x]
    data = file.cast(codes.codes, np.uint8, kind)
    if codes.offset:
        data = file.op("Sub", data, kind.type(codes.offset))
    data = file.transpose(data, lhs)
    scaled = times(kernel, codes.unit)
    assert scaled is not None, "scales are positive"
    return data, scaled


def _ended(file: FunctionFile, operation: Operation, name: str, axes: Sequence[int]) -> str:
    """The name of what a convolution gives, in the order that the function has it.

    Args:
      file: where to; what is known of its ending is written here too.
      operation: the convolution.
      name: of its numbers, its bias added if there is one.
      axes: which axis of the output each of theirs is.
    """
    back = [list(axes).index(i) for i in range(len(axes))]
    ending = file.ending(operation)
    if ending is None:
        return file.transpose(name, back)
    file.written.update(ending.operations)
    if ending.quantize is not None:
        value = ending.quantize.outputs[0]
        codes = coded(file, ending.quantize, name)
        codes = dataclasses.replace(codes, codes=file.transpose(codes.codes, back))
        file.names[value] = add_codes(file, value, codes)
    elif ending.add is not None:
        file.names[ending.add.outputs[0]] = file.transpose(name, back)
    return name


def _plus_bias(file: FunctionFile, operation: Operation, name: str) -> str:
    """Numbers with the channels first, and their bias."""
    ending = file.ending(operation)
    if ending is None or ending.bias is None:
        return name
    places = len(ending.bias.shape) - 2
    bias = ending.bias.reshape(-1, *(1,) * places)
    return file.op("Add", name, file.array(f"{file.stem}/bias", bias))


def _direct(
    file: FunctionFile,
    operation: Operation,
    data: str,
    shape: Shape,
    kernel: Operand,
    kind: np.dtype,
) -> str:
    """A convolution, with zeros put between its inputs where it is one by their dilation."""
    params = operation.params
    rhs = tuple(params["dimension_numbers"].rhs_spec)
    window = tuple(kernel.shape[i] for i in rhs)
    weights = arranged(file, kernel, rhs, window, kind)
    pads = [tuple(ends) for ends in params["padding"]]
    dilated = any(factor != 1 for factor in params["lhs_dilation"])
    if dilated or any(end < 0 for ends in pads for end in ends):
        config = [(0, 0, 0)] * 2 + [
            (*ends, factor - 1) for ends, factor in zip(pads, params["lhs_dilation"], strict=True)
        ]
        data, _ = padded_with(file, data, shape, config, file.constant(kind.type(0)))
        pads = [(0, 0)] * len(pads)
    ending = file.ending(operation)
    bias = []
    if ending is not None and ending.bias is not None:
        bias.append(file.array(f"{file.stem}/bias", ending.bias.reshape(-1)))
    return file.op(
        "Conv",
        data,
        weights,
        *bias,
        kernel_shape=[kernel.shape[i] for i in rhs[2:]],
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=[start for start, _ in pads] + [end for _, end in pads],
    )


def _transposed(
    file: FunctionFile, operation: Operation, data: str, kernel: Operand, kind: np.dtype
) -> str | None:
    """A convolution of dilated inputs as ConvTranspose, where that has its numbers."""
    params = operation.params
    steps, pads = params["lhs_dilation"], params["padding"]
    if all(step == 1 for step in steps) or isinstance(kernel, Value):
        return None
    if any(n != 1 for n in (*params["window_strides"], *params["rhs_dilation"])):
        return None
    rhs = tuple(params["dimension_numbers"].rhs_spec)
    out, own, *window = (kernel.shape[i] for i in rhs)
    before = [size - 1 - start for size, (start, _) in zip(window, pads, strict=True)]
    behind = [size - 1 - end for size, (_, end) in zip(window, pads, strict=True)]
    more = [max(-end, 0) for end in behind]
    if min(before) < 0 or any(m >= step for m, step in zip(more, steps, strict=True)):
        return None
    groups = params["feature_group_count"]

    def turned(weights: np.ndarray) -> np.ndarray:
        """Its inputs in front, and each place at the other end."""
        weights = np.flip(weights.transpose(rhs), tuple(range(2, len(rhs))))
        weights = weights.reshape(groups, out // groups, own, *window).swapaxes(1, 2)
        return weights.reshape(groups * own, out // groups, *window)

    moved: Operand
    if isinstance(kernel, Codes):
        moved = kernel.moved(turned)
    else:
        moved = Constant(np.ascontiguousarray(turned(np.asarray(kernel.array))), kernel.path)
    return file.op(
        "ConvTranspose",
        data,
        file.cast(file.name(moved), kernel.dtype, kind),
        kernel_shape=window,
        strides=list(steps),
        group=groups,
        pads=before + [max(end, 0) for end in behind],
        output_padding=more,
    )


CONVOLUTIONS: dict[str, Write] = {"conv_general_dilated": _convolution}
