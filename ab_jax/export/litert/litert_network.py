"""LiteRT (TensorFlow Lite): a network as a .tflite file, with our integers in it.

    data = to_litert(describe(model, variables, (224, 224, 3)))

From normalized float32 images [batch, *image_shape] to float32 logits [batch, classes], under the
signature `serving_default`; the interpreter can be resized to any batch. The file is written of the
graph itself, and no converter has a say in it.

Where a layer's input is quantized and its output is again, directly or through a ReLU or ReLU6, it
is an integer operator from int8 codes to int8 codes. LiteRT has no operator that gives the integer
sum as it is, so that a layer whose output the network keeps in float (before a sum, an average, a
norm that cannot fold, and the logits) is a float operator on the numbers that codes stand for:
DEQUANTIZE makes them, those of weights once, when the interpreter first runs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.graph.fold import fold_batch_norm
from ab_jax.export.graph.operations import (
    Add,
    Affine,
    Clip,
    Convolution,
    Dense,
    Flatten,
    Graph,
    MaxPool,
    Mean,
    Node,
    Quantize,
    Sign,
    Subsample,
)
from ab_jax.export.litert.litert_integers import activation_scales
from ab_jax.export.litert.litert_layers import write_layer
from ab_jax.export.litert.litert_values import CLIPS, Values, padding_kind

METADATA = "ab_jax"  # the name under which a file has its description


def to_litert(
    graph: Graph, *, description: Mapping[str, Any] | None = None, narrowest: int = 8
) -> bytes:
    """The bytes of a .tflite file.

    Args:
      graph: of the network; its batch norms are folded where they can be.
      description: JSON values that travel with the file, as the entry `ab_jax` of its metadata:
        class names, say, and the mean and deviation by which images are normalized.
      narrowest: width in bits, 8, 4 or 2, below which no codes are stored: the weights of float
        operators may take 4 or 2 bits where that is enough, but XNNPACK, the interpreter's fast
        kernels, reads none but those of 8. Weights of integer operators always take 8.

    Raises:
      ValueError: scales that LiteRT's tensors do not have, or another width; names the layer.
    """
    if narrowest not in (2, 4, 8):
        raise ValueError(f"narrowest={narrowest!r}: codes are stored at 2, 4 or 8 bits.")
    graph = fold_batch_norm(graph)
    values = Values(graph)
    images = values.floats(0)
    for i, node in enumerate(graph.nodes):
        if i in values.done:
            continue
        if isinstance(node.operation, Convolution | Dense):
            write_layer(values, i, node, node.operation, narrowest)
        else:
            _write(values, i + 1, node)
    metadata = {} if description is None else {METADATA: description}
    return values.file.serialize(images, values.floats(len(graph.nodes)), metadata)


def _write(values: Values, value: int, node: Node) -> None:
    """Write a node that is no layer, and that gives `value`."""
    file, name, first = values.file, node.name, node.inputs[0]
    x = values.floats(first)
    match node.operation:
        case Affine(scale, shift):
            scaled = file.tensor(f"{name}/scaled", node.shape)
            factor = file.constant(f"{name}/scale", np.asarray(scale, np.float32))
            file.operator("MUL", [x, factor], [scaled], schema.MulOptionsT())
            offset = file.constant(f"{name}/shift", np.asarray(shift, np.float32))
            _add(values, value, name, [scaled, offset])
        case Add():
            _add(values, value, name, [values.floats(i) for i in node.inputs])
        case Quantize():
            _quantize(values, value, node, node.operation)
        case Clip(high) if high in CLIPS:
            code = "RELU6" if high == 6 else "RELU"
            file.operator(code, [x], [values.new_floats(name, value)])
        case Clip(high):
            positive = file.tensor(f"{name}/positive", node.shape)
            file.operator("RELU", [x], [positive])
            end = file.constant(f"{name}/high", np.array([high], np.float32))
            y = values.new_floats(name, value)
            file.operator("MINIMUM", [positive, end], [y], schema.MaximumMinimumOptionsT())
        case Sign():
            zero, one, minus_one = (
                file.constant(f"{name}/{number}", np.array([number], np.float32))
                for number in (0, 1, -1)
            )
            test = file.tensor(f"{name}/test", node.shape, "BOOL")
            file.operator("GREATER_EQUAL", [x, zero], [test], schema.GreaterEqualOptionsT())
            inputs, y = [test, one, minus_one], values.new_floats(name, value)
            file.operator("SELECT_V2", inputs, [y], schema.SelectV2OptionsT())
        case MaxPool():
            _max_pool(values, value, node, node.operation)
        case Mean():
            inputs = [x, file.constant(f"{name}/axes", np.array([1, 2], np.int32))]
            y = values.new_floats(name, value)
            file.operator("MEAN", inputs, [y], schema.ReducerOptionsT(keepDims=False))
        case Flatten():
            shape = [-1, *node.shape]
            inputs = [x, file.constant(f"{name}/shape", np.array(shape, np.int32))]
            y = values.new_floats(name, value)
            file.operator("RESHAPE", inputs, [y], schema.ReshapeOptionsT(newShape=shape))
        case Subsample():
            _subsample(values, value, node, node.operation)


def _add(values: Values, value: int, name: str, inputs: list[int]) -> None:
    fused, value = values.clip_after(value)
    y = values.new_floats(name, value)
    options = schema.AddOptionsT(fusedActivationFunction=fused)
    values.file.operator("ADD", inputs, [y], options)


def _quantize(values: Values, value: int, node: Node, quantize: Quantize) -> None:
    """Codes saturate at 127, ours at the top; what is below our lowest is clipped before."""
    file, first, shape = values.file, node.inputs[0], node.shape
    x = values.floats(first)
    lowest = quantize.quantizer.levels[0]
    scales = activation_scales(quantize)
    if lowest < 0:
        # The quotient of this number and the scale is off by its last bit at most.
        end = file.constant(f"{node.name}/lowest", lowest * scales.scale)
        clipped = file.tensor(f"{node.name}/clipped", shape)
        file.operator("MAXIMUM", [x, end], [clipped], schema.MaximumMinimumOptionsT())
        x = clipped
    elif scales.zero_point[0] > -128 and not _is_positive(values, first):
        clipped = file.tensor(f"{node.name}/clipped", shape)
        file.operator("RELU", [x], [clipped])
        x = clipped
    y = values.new_codes(node.name, value, quantize)
    file.operator("QUANTIZE", [x], [y], schema.QuantizeOptionsT())


def _is_positive(values: Values, value: int) -> bool:
    """Whether a value cannot be negative, as far as its operations tell."""
    match values.operation(value):
        case Clip():
            return True
        case MaxPool() | Mean() | Flatten() | Subsample():
            return _is_positive(values, values.graph.nodes[value - 1].inputs[0])
    return False


def _max_pool(values: Values, value: int, node: Node, pool: MaxPool) -> None:
    x, shape = values.floats(node.inputs[0]), values.shape(node.inputs[0])
    padding = padding_kind(shape, pool.window, pool.strides, pool.padding)
    if padding is None or (padding == schema.Padding.SAME and pool.value != -np.inf):
        x = values.padded(f"{node.name}/padded", x, shape, pool.padding, float(pool.value))
        padding = schema.Padding.VALID
    (height, width), strides = pool.window, pool.strides
    options = schema.Pool2DOptionsT(
        padding=padding,
        filterHeight=height,
        filterWidth=width,
        strideH=strides[0],
        strideW=strides[1],
    )
    values.file.operator("MAX_POOL_2D", [x], [values.new_floats(node.name, value)], options)


def _subsample(values: Values, value: int, node: Node, subsample: Subsample) -> None:
    file, name, stride = values.file, node.name, subsample.stride
    x = values.floats(node.inputs[0])
    if stride > 1:
        kept = (*node.shape[:2], node.shape[2] - subsample.channels)
        y = file.tensor(f"{name}/kept", kept) if subsample.channels else None
        y = values.new_floats(name, value) if y is None else y
        parts = {"begin": [0] * 4, "end": [0] * 4, "strides": [1, stride, stride, 1]}
        inputs = [
            file.constant(f"{name}/{part}", np.array(of, np.int32)) for part, of in parts.items()
        ]
        every = 0b1111  # axis from its begin to its end
        options = schema.StridedSliceOptionsT(beginMask=every, endMask=every)
        file.operator("STRIDED_SLICE", [x, *inputs], [y], options)
        x = y
    if subsample.channels:
        sizes = np.array([(0, 0), (0, 0), (0, 0), (0, subsample.channels)], np.int32)
        inputs = [x, file.constant(f"{name}/sizes", sizes)]
        file.operator("PAD", inputs, [values.new_floats(name, value)], schema.PadOptionsT())
