"""Convolutions, written into a LiteRT file of a function. Channels are last in LiteRT."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.flatbuffer import Scales
from ab_jax.export.litert.litert_elementwise import Write
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_layers import Layer, write_layer
from ab_jax.export.litert.litert_layouts import padded_with
from ab_jax.export.litert.litert_products import moved
from ab_jax.export.litert.litert_tensors import Tensor, computed_in
from ab_jax.export.traced import Dim, Operation, Shape, Size, Value
from ab_jax.export.traced.carrying import NotCarriedError, check_padding

_MOST_AXES = 3  # of images


class _Convolution:
    """A convolution as LiteRT has it: images [batch, axes..., channels], of two axes at least."""

    def __init__(self, file: LitertFile, operation: Operation) -> None:
        params, (x, kernel) = operation.params, operation.inputs
        self.file, self.operation, self.groups = file, operation, params["feature_group_count"]
        numbers = params["dimension_numbers"]
        lhs, rhs, out = (tuple(s) for s in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
        self.order = [lhs[0], *lhs[2:], lhs[1]]
        self.of_kernel = [*rhs[2:], rhs[1], rhs[0]]
        self.of_result = [out[0], *out[2:], out[1]]
        front = [1] if len(lhs) == 3 else []  # images of one axis get another
        self.spread = len(front)
        self.window: Any = (*front, *(kernel.shape[i] for i in rhs[2:]))
        self.inside, self.features = kernel.shape[rhs[1]], kernel.shape[rhs[0]]
        self.strides = (*front, *params["window_strides"])
        self.dilation = (*front, *params["rhs_dilation"])
        self.between = (*front, *params["lhs_dilation"])
        self.pads = [*[(0, 0)] * self.spread, *(tuple(ends) for ends in params["padding"])]
        self.images: Shape = self.wider(tuple(x.shape[i] for i in self.order))
        self.result: Shape = self.wider(
            tuple(operation.outputs[0].shape[i] for i in self.of_result)
        )
        if any(isinstance(size, Size) for size in self.window):
            raise NotCarriedError("with a kernel whose size is open")
        check_padding(self.pads)

    def wider(self, shape: Shape) -> Shape:
        """A shape with the axis that images of one axis get."""
        return (shape[0], *[1] * self.spread, *shape[1:])

    def arranged(self, x: Tensor) -> Tensor:
        """An input in LiteRT's order."""
        return self.file.reshape(self.file.transpose(x, self.order), self.images)

    def back(self, y: Tensor) -> Tensor:
        """A result in the function's order."""
        shape = tuple(self.operation.outputs[0].shape[i] for i in self.of_result)
        order = [self.of_result.index(i) for i in range(len(shape))]
        return self.file.transpose(self.file.reshape(y, shape), order)

    def kernel(self, w: np.ndarray) -> np.ndarray:
        """A weight [axes..., channels in, channels out]."""
        return w.transpose(self.of_kernel).reshape(*self.window, self.inside, self.features)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved by itself, for which there is another operator."""
        plain = len(self.window) == 2
        return plain and self.inside == 1 and self.groups == self.images[-1] and self.groups > 1

    def padded(self, x: Tensor) -> tuple[Tensor, int]:
        """An input as an operator takes it, and the operator's padding."""
        if all(factor == 1 for factor in self.between):
            reach = [(n - 1) * d + 1 for n, d in zip(self.window, self.dilation, strict=True)]
            kind = padding_kind(x.shape[1:-1], reach, self.strides, self.pads)
            if kind is not None:
                return x, kind
        inner = [(*e, f - 1) for e, f in zip(self.pads, self.between, strict=True)]
        config = [(0, 0, 0), *inner, (0, 0, 0)]
        return padded_with(self.file, x, config), schema.Padding.VALID

    def call(self, inputs: Sequence[Tensor], scales: Scales | None, activation: int) -> Tensor:
        """Append the operator."""
        x, *weights = inputs
        x, padding = self.padded(x)
        if len(self.window) == 3:
            code, options = "CONV_3D", schema.Conv3DOptionsT()
            options.strideD, options.strideH, options.strideW = self.strides
            options.dilationDFactor, options.dilationHFactor, options.dilationWFactor = (
                self.dilation
            )
            version = 1
        else:
            version = 1 if scales is None else 3
            if self.is_depthwise:
                code, options = "DEPTHWISE_CONV_2D", schema.DepthwiseConv2DOptionsT()
                options.depthMultiplier = self.features // self.groups
                version = max(version, 2 if max(self.dilation) > 1 else 1)
            else:
                code, options = "CONV_2D", schema.Conv2DOptionsT()
                version = version if self.groups == 1 else 6
            options.strideH, options.strideW = self.strides
            options.dilationHFactor, options.dilationWFactor = self.dilation
        options.padding, options.fusedActivationFunction = padding, activation
        dtype = np.float32 if scales is None else np.int8
        return self.file.op(
            code,
            x,
            *weights,
            shape=self.result,
            dtype=dtype,
            scales=scales,
            options=options,
            version=version,
        )


def _convolution(file: LitertFile, operation: Operation) -> Tensor | None:
    x, kernel = operation.inputs
    if operation.params["batch_group_count"] != 1:
        raise NotCarriedError("with groups of the batch")
    if not 3 <= len(x.shape) <= _MOST_AXES + 2:
        raise NotCarriedError(f"over {len(x.shape) - 2} axes")
    if computed_in(operation.outputs[0].dtype) != np.float32:
        raise NotCarriedError(f"of {x.dtype}")
    layer = _Convolution(file, operation)
    count = len(layer.window)
    if count == 3 and layer.groups > 1:
        raise NotCarriedError("over 3 axes in groups")
    if isinstance(kernel, Value):
        return _of_values(file, layer)
    weight = moved(kernel, layer.kernel)
    transposed = _transposed(file, layer)
    stored: Sequence[int]
    if transposed is not None:
        weight = moved(weight, lambda w: np.flip(w, (0, 1)))
        call, stored = transposed, (3, 0, 1, 2)
    elif layer.is_depthwise:
        call, stored = layer.call, (2, 0, 1, 3)
    elif count == 3:
        call, stored = layer.call, (0, 1, 2, 3, 4)
    else:
        call, stored = layer.call, (3, 0, 1, 2)
    is_whole = count == 2 and transposed is None and all(f == 1 for f in layer.between)
    parts = (operation, x, layer.arranged, weight, stored, call, layer.back, is_whole)
    write_layer(file, Layer(*parts))
    return None


def _of_values(file: LitertFile, layer: _Convolution) -> Tensor:
    """With a kernel that depends on inputs."""
    x, kernel = (file.cast(file.tensor(v), np.float32) for v in layer.operation.inputs)
    count = len(layer.window)
    order = [*range(count - layer.spread), count - layer.spread, count - layer.spread + 1]
    kernel = file.transpose(kernel, [layer.of_kernel[i] for i in order])
    kernel = file.reshape(kernel, (*layer.window, layer.inside, layer.features))
    if count == 2:
        kernel = file.transpose(kernel, (2, 0, 1, 3) if layer.is_depthwise else (3, 0, 1, 2))
    bias = file.array(np.zeros(layer.features, np.float32))
    result = layer.back(layer.call([layer.arranged(x), kernel, bias], None, 0))
    return file.cast(result, layer.operation.outputs[0].dtype)


def _transposed(
    file: LitertFile, layer: _Convolution
) -> Callable[[Sequence[Tensor], Scales | None, int], Tensor] | None:
    """What appends a convolution of dilated inputs as TRANSPOSE_CONV, where that has its numbers.

    It gives all that the inputs reach, of which the paddings cut something off.
    """
    steps = layer.between
    if len(layer.window) != 2 or layer.groups != 1 or all(step == 1 for step in steps):
        return None
    if any(n != 1 for n in (*layer.strides, *layer.dilation)):
        return None
    sizes = layer.images[1:3]
    full: list[Dim] = [
        (size - 1) * step + n for size, step, n in zip(sizes, steps, layer.window, strict=True)
    ]
    ends = [
        tuple(end - (n - 1) for end in pair)
        for n, pair in zip(layer.window, layer.pads, strict=True)
    ]

    def call(inputs: Sequence[Tensor], scales: Scales | None, activation: int) -> Tensor:
        x, kernel, bias = inputs
        shape = (layer.images[0], *full, layer.features)
        options = schema.TransposeConvOptionsT(padding=schema.Padding.VALID)
        options.strideH, options.strideW = steps
        y = file.op(
            "TRANSPOSE_CONV",
            file.shape(shape),
            kernel,
            x,
            shape=shape,
            dtype=np.float32,
            options=options,
        )
        config = [(0, 0, 0), *((*pair, 0) for pair in ends), (0, 0, 0)]
        y = padded_with(file, y, config)
        added = schema.AddOptionsT(fusedActivationFunction=activation)
        return file.op("ADD", y, bias, options=added)

    return call


def padding_kind(
    sizes: Sequence[Dim],
    window: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
) -> int | None:
    """The padding of LiteRT's operators that is this one, or None: it takes an operator of its own.

    Args:
      sizes: of the input, height first.
      window: how far the kernel reaches, height first.
      strides: along each axis.
      pads: those asked for.
    """
    if not any(map(any, pads)):
        return int(schema.Padding.VALID)
    same = []
    for size, taps, stride in zip(sizes, window, strides, strict=True):
        if isinstance(size, Size) and stride > 1:
            return None
        steps = 0 if isinstance(size, Size) else (-(-size // stride) - 1) * stride - size + 1
        total = max(steps + taps - 1, 0)
        same.append((total // 2, total - total // 2))
    return int(schema.Padding.SAME) if list(pads) == same else None


CONVOLUTIONS: dict[str, Write] = {"conv_general_dilated": _convolution}
