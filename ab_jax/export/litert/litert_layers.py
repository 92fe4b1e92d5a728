"""Convolutions and dense layers as LiteRT's operators, on int8 codes where that is possible."""

import math
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.graph.operations import Clip, Convolution, Dense, Node, Quantize, shape_of
from ab_jax.export.litert.flatbuffer import Scales
from ab_jax.export.litert.litert_integers import (
    activation_scales,
    channel_axis,
    in_layout,
    integers,
    is_depthwise,
    weight_scales,
    width,
)
from ab_jax.export.litert.litert_values import CLIPS, Values, padding_kind
from ab_jax.quantizers import Quantized


class _Ends(NamedTuple):
    """What is before and after a layer that could be one in integers.

    Attributes:
      x: makes the codes it takes.
      y: makes codes of what it gives.
      fused: the clipping between, as the schema has it.
      value: the number of the codes of `y`.
    """

    x: Quantize
    y: Quantize
    fused: int
    value: int


def write_layer(
    values: Values, i: int, node: Node, layer: Convolution | Dense, narrowest: int
) -> None:
    """Write node `i`, and what follows it that its operator does, too.

    Raises:
      ValueError: scales that LiteRT's tensors do not have; names the layer.
    """
    ends = _ends(values, i + 1, node.inputs[0])
    whole = None if ends is None else integers(node.name, layer, ends.x, ends.y)
    if ends is None or whole is None:
        x = values.floats(node.inputs[0])
        weights = _float_weights(values, node, layer, narrowest)
        fused, value = values.clip_after(i + 1)
        y = values.new_floats(node.name, value)
        _call(values, node, layer, [x, *weights], y, fused, None)
        return
    zeros = np.zeros(whole.scale.shape, np.int64)
    scales = Scales(whole.scale, zeros, channel_axis(layer))
    kernel = values.file.constant(f"{node.name}/kernel", in_layout(layer, whole.codes), scales)
    scales = Scales(whole.bias_scale, zeros)
    bias = values.file.constant(f"{node.name}/bias", whole.bias, scales)
    values.done.update(range(i + 1, ends.value))
    y = values.new_codes(values.graph.nodes[ends.value - 1].name, ends.value, ends.y)
    x = values.codes[node.inputs[0]]
    _call(values, node, layer, [x, kernel, bias], y, ends.fused, activation_scales(ends.x))


def _ends(values: Values, value: int, x: int) -> _Ends | None:
    before, user = values.operation(x), values.only_user(value)
    if not isinstance(before, Quantize) or user is None:
        return None
    high, operation = math.inf, values.graph.nodes[user].operation
    if isinstance(operation, Clip):
        high, user = operation.high, values.only_user(user + 1)
        if user is None:
            return None
        operation = values.graph.nodes[user].operation
    if not isinstance(operation, Quantize) or operation.quantizer.signed:
        return None
    # Unsigned codes saturate at the limit and turn what is negative into 0, as ReLU does.
    high = math.inf if high >= operation.limit else high
    return _Ends(before, operation, CLIPS[high], user + 1) if high in CLIPS else None


def _float_weights(
    values: Values, node: Node, layer: Convolution | Dense, narrowest: int
) -> list[int]:
    """Kernel and bias in float32; a kernel of codes is stored as codes."""
    file, name = values.file, f"{node.name}/kernel"
    numbers = np.zeros(node.shape[-1], np.float32)  # where there is none, since XNNPACK wants one
    if layer.bias is not None:
        numbers[:] = np.asarray(layer.bias)
    bias = file.constant(f"{node.name}/bias", numbers)
    if not isinstance(layer.kernel, Quantized):
        return [file.constant(name, in_layout(layer, np.asarray(layer.kernel))), bias]
    codes = in_layout(layer, np.asarray(layer.kernel.codes))
    scales = weight_scales(node.name, layer.kernel)._replace(axis=channel_axis(layer))
    bits = max(narrowest, width(codes))
    stored = file.constant(name, codes, scales, bits=bits)
    kernel = file.value(f"{name}/values", codes.shape)
    version = {2: 7, 4: 6, 8: 5 if len(scales.scale) > 1 else 2}[bits]
    file.operator("DEQUANTIZE", [stored], [kernel], schema.DequantizeOptionsT(), version)
    return [kernel, bias]


def _call(
    values: Values,
    node: Node,
    layer: Convolution | Dense,
    inputs: list[int],
    y: int,
    fused: int,
    scales: Scales | None,
) -> None:
    """The operator itself, on floats or on codes of these scales."""
    code, version = "FULLY_CONNECTED", 1 if scales is None else 4
    options: Any = schema.FullyConnectedOptionsT(fusedActivationFunction=fused)
    if isinstance(layer, Convolution):
        shape = values.shape(node.inputs[0])
        padding = padding_kind(shape, shape_of(layer.kernel)[:2], layer.strides, layer.padding)
        if padding is None:
            name, padding = f"{node.name}/padded", schema.Padding.VALID
            inputs[0] = values.padded(name, inputs[0], shape, layer.padding, scales=scales)
        version = 1 if scales is None else 3
        if is_depthwise(layer):
            code, options = "DEPTHWISE_CONV_2D", schema.DepthwiseConv2DOptionsT()
            options.depthMultiplier = node.shape[-1] // shape[-1]
        else:
            code, options = "CONV_2D", schema.Conv2DOptionsT()
            version = version if layer.groups == 1 else 6
        options.padding, options.fusedActivationFunction = padding, fused
        options.strideH, options.strideW = layer.strides
    values.file.operator(code, inputs, [y], options, version)
