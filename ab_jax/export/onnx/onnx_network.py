"""ONNX: a network as a file of the open standard, which ONNX Runtime and others run.

    model = to_onnx(describe(model, variables, image_shape), mean=mean, std=std)
    Path("net.onnx").write_bytes(model.SerializeToString())

The file is built of the network's graph with the `onnx` package's own helpers, the format's
reference implementation: exporters that trace JAX programs do not know codes from other integers.
Codes lie in it as int8 beside their scales, in QuantizeLinear/DequantizeLinear pairs around each
layer, which ONNX Runtime fuses into its integer kernels. A layer takes one of three forms:

- a product of matrices of codes with a float32 bias, for dense layers and convolutions up to 3 x 3
  but depthwise ones; ONNX Runtime makes it MatMulIntegerToFloat. Larger kernels than 1 x 1 take
  copies of their input's codes, one for each place of the kernel;
- with `integer_biases`, convolutions that give out codes are in integers as a whole: QLinearConv,
  whose bias is an int32 in units of the products. It is faster, and the bias is rounded by at most
  half a unit, for which some codes change;
- in float32, with codes times scales for weights, computed once when the file is loaded, where
  there is no integer kernel: unquantized inputs; depthwise and larger kernels; scales by group.

Codes of activations are uint8. Signed ones have the zero point 128, since a kernel wants one type
on both sides; those below 8 bits, and signed ones, are clipped as integers.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import ab_jax
from ab_jax.export.graph.early_quantization import quantize_early
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
from ab_jax.export.onnx.onnx_file import OnnxFile
from ab_jax.export.onnx.onnx_layers import Codes, Value, add_layer, strided

IMAGES = "images"
LOGITS = "logits"


def to_onnx(
    graph: Graph,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    description: Mapping[str, Any] | None = None,
    int4: bool = False,
    integer_biases: bool = False,
) -> onnx.ModelProto:
    """The network as an ONNX model from `images` to `logits`, float32 [batch, classes], any batch.

    Args:
      graph: the network; its batch norms are folded here.
      mean, std: per channel, for pixels in 0 to 1. With them the model takes uint8 images
        [batch, height, width, channels] and normalizes them; without, float32 ones that are
        normalized already.
      class_names: one for each logit.
      description: JSON values that say what network this is.
      int4: store codes of at most 4 bits as int4. The file is smaller and needs opset 21, else 13;
        what ONNX Runtime makes of it is the same.
      integer_biases: round the biases of convolutions between codes to what ONNX Runtime's fastest
        kernels take. Without, logits are `evaluate`'s to float tolerance, but for codes on the
        border of two.

    Returns:
      A model with the metadata `class_names`, `mean`, `std` and `network`, each as JSON, as far as
      they are given. The same network gives the same bytes by
      `SerializeToString(deterministic=True)`.

    Raises:
      ValueError: a mean without std (or the other way round), or of other channels; a std that is
        not above 0; class names of another number.
    """
    classes = graph.nodes[-1].shape[0]
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"There are {len(class_names)} class names for {classes} classes.")
    file = OnnxFile()
    values = [_images(file, graph.image_shape, mean, std)]
    early = quantize_early(fold_batch_norm(graph))
    for i, node in enumerate(early.nodes):
        inputs = [values[value] for value in node.inputs]
        users = [early.nodes[user].operation for user in early.users(i + 1)]
        operation = node.operation
        if isinstance(operation, Convolution | Dense):
            to_codes = len(users) == 1 and isinstance(users[0], Quantize)
            given = add_layer(
                file,
                node.name,
                operation,
                inputs[0],
                node.shape,
                to_codes=to_codes,
                int4=int4,
                integer_bias=integer_biases,
            )
        elif isinstance(operation, Quantize):
            given = _quantize(file, node.name, operation, inputs[0])
        elif isinstance(operation, MaxPool):
            given = _max_pool(file, node, operation, inputs[0])
        else:
            given = _plain(file, node, inputs)
        values.append(given)
    file.rename(values[-1].floats(file), LOGITS)
    metadata = {
        "class_names": None if class_names is None else list(class_names),
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "network": None if description is None else dict(description),
    }
    pixel = TensorProto.FLOAT if mean is None else TensorProto.UINT8
    model = file.model(
        [helper.make_tensor_value_info(IMAGES, pixel, ["batch", *graph.image_shape])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", classes])],
        opset=21 if int4 else 13,
        ir_version=10 if int4 else 8,
        metadata={name: json.dumps(value) for name, value in metadata.items() if value is not None},
    )
    model.producer_version = ab_jax.__version__
    return model


def _images(
    file: OnnxFile,
    shape: tuple[int, int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Value:
    """The normalized images, channels first as ONNX has them."""
    if (mean is None) != (std is None):
        raise ValueError("Give both mean and std, or neither.")
    x = file.node("Transpose", [IMAGES], "channels_first", perm=[0, 3, 1, 2])
    if mean is None or std is None:
        return Value(shape, x)
    channels = shape[-1]
    if len(mean) != channels or len(std) != channels or not min(std) > 0:
        raise ValueError(
            f"Images of {channels} channels want as many means and positive deviations, not "
            f"mean={list(mean)} and std={list(std)}."
        )
    # In the order of `ab_jax.data.augment.normalize`, for the same bits.
    center = np.array([255.0 * m for m in mean], np.float32).reshape(-1, 1, 1)
    scale = np.array([1.0 / (255.0 * s) for s in std], np.float32).reshape(-1, 1, 1)
    x = file.node("Cast", [x], "pixels", to=TensorProto.FLOAT)
    x = file.node("Sub", [x, file.array("center", center)], "centered")
    return Value(shape, file.node("Mul", [x, file.array("per_deviation", scale)], "normalized"))


def _quantize(file: OnnxFile, name: str, operation: Quantize, x: Value) -> Value:
    quantizer = operation.quantizer
    zero_point = np.uint8(128 if quantizer.signed else 0)
    scale = np.asarray(quantizer.scale(operation.limit), np.float32)
    arrays = file.array(f"{name}_scale", scale), file.constant(zero_point)
    stored = file.node("QuantizeLinear", [x.floats(file), *arrays], f"{name}_codes")
    ends = [int(zero_point) + level for level in quantizer.levels]
    if ends != [0, 255]:  # of uint8, where QuantizeLinear stops by itself
        stored = file.node(
            "Clip", [stored, *(file.constant(np.uint8(end)) for end in ends)], f"{name}_clipped"
        )
    return Value(x.shape, None, Codes(stored, scale, zero_point, arrays), x.order)


def _max_pool(file: OnnxFile, node: Node, operation: MaxPool, x: Value) -> Value:
    codes = x.codes
    pooled = codes.name if codes else x.floats(file)
    (top, bottom), (left, right) = operation.padding
    pads = [top, left, bottom, right]
    if any(pads) and operation.value != -float("inf"):
        # Codes are pooled where what surrounds them is 0 (`quantize_early`).
        around = file.constant(codes.zero_point if codes else np.float32(operation.value))
        amounts = file.constant(np.array([0, 0, top, left, 0, 0, bottom, right]))
        pooled = file.node("Pad", [pooled, amounts, around], f"{node.name}_padded")
        pads = [0] * 4
    window = {"kernel_shape": operation.window, "strides": operation.strides, "pads": pads}
    pooled = file.node("MaxPool", [pooled], node.name, **window)
    if codes:
        return Value(node.shape, None, dataclasses.replace(codes, name=pooled))
    return Value(node.shape, pooled)


def _plain(file: OnnxFile, node: Node, inputs: list[Value]) -> Value:
    """An operation without kernel, in float32."""
    name, before = node.name, inputs[0]
    x = before.floats(file)
    order = before.order
    match node.operation:
        case Affine(scale, shift):
            by_channel = [before.by_channel(np.asarray(v, np.float32)) for v in (scale, shift)]
            x = file.node("Mul", [x, file.array(f"{name}/scale", by_channel[0])], f"{name}/scaled")
            x = file.node("Add", [x, file.array(f"{name}/shift", by_channel[1])], name)
        case Clip(high) if high == float("inf"):
            x = file.node("Relu", [x], name)
        case Clip(high):
            ends = [file.constant(np.float32(end)) for end in (0, high)]
            x = file.node("Clip", [x, *ends], name)
        case Sign():
            zero, up, down = (file.constant(np.float32(value)) for value in (0, 1, -1))
            negative = file.node("Less", [x, zero], f"{name}_is_negative")
            x = file.node("Where", [negative, down, up], name)
        case Mean():
            x = file.node("GlobalAveragePool", [x], f"{name}_pooled")
            x = file.node("Flatten", [x], name, axis=1)
        case Flatten():
            x = file.node("Flatten", [x], name, axis=1)
            places = np.arange(math.prod(before.shape)).reshape(before.shape)
            order = places.transpose(2, 0, 1).reshape(-1)
        case Add():
            x = file.node("Add", [x, inputs[1].floats(file)], name)
        case Subsample(stride, channels):
            x = strided(file, x, name, (stride, stride))
            if channels:
                amounts = file.constant(np.array([0, 0, 0, 0, 0, channels, 0, 0]))
                x = file.node("Pad", [x, amounts, file.constant(np.float32(0))], name)
    return Value(node.shape, x, order=order)
