"""Inference in integers: int8 codes times int8 codes, summed in int32, then one scale a channel.

    graph = fold_batch_norm(describe(model, variables, image_shape))
    logits = jax.jit(lambda images: evaluate_in_integers(graph, images))(images)

A layer runs in integers if its input is quantized, to codes or to signs, and its kernel is, with
scales that the products of one sum share. The values between layers are float32: what a layer sums
up is multiplied by the scales of its input and of its kernel, and the next layer's `Quantize` makes
codes of it again. `layers_in_float` names the layers that are left.

The codes are those of `evaluate`, but for values on the border of two, which rounding may move.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ab_jax.export.graph.operations import (
    Convolution,
    Dense,
    Flatten,
    Graph,
    Node,
    Quantize,
    Sign,
    apply,
    by_channel,
    check_images,
    plus,
)
from ab_jax.quantizers import Quantized

_MOST_PRODUCTS = 2**31 // 2**14  # of two int8, in an int32


@dataclasses.dataclass(frozen=True)
class _Codes:
    """Values `(codes + offset) * scale`, of int8 codes; the offset is for unsigned ones."""

    codes: Array
    offset: int
    scale: Array

    def values(self) -> Array:
        return (self.codes.astype(jnp.float32) + self.offset) * self.scale


def evaluate_in_integers(graph: Graph, images: Array, *, for_cpu: bool | None = None) -> Array:
    """Logits, float32 [batch, classes], of normalized float32 images [batch, *image_shape].

    Args:
      graph: with batch norm folded or not; folded, less is left to compute in floating point.
      images: normalized.
      for_cpu: convolutions as products of matrices, or else as XLA's own. None: whichever suits the
        default backend. XLA's int8 convolutions have been seen to sum wrongly on some CPUs.

    Raises:
      ValueError: images of another shape or type.
    """
    check_images(graph, images)
    if for_cpu is None:
        for_cpu = jax.default_backend() == "cpu"
    values: list[Array | _Codes] = [images]
    for node in graph.nodes:
        given = [values[i] for i in node.inputs]
        values.append(_run(graph, node, given, for_cpu))
    logits = values[-1]
    return logits.values() if isinstance(logits, _Codes) else logits


def layers_in_float(graph: Graph) -> list[str]:
    """Names of the convolutions and dense layers that do not run in integers."""
    return [
        node.name
        for node in graph.nodes
        if isinstance(node.operation, Convolution | Dense) and not _in_integers(graph, node)
    ]


def _in_integers(graph: Graph, node: Node) -> bool:
    layer = node.operation
    return (
        isinstance(layer, Convolution | Dense)
        and isinstance(layer.kernel, Quantized)
        # One scale for all the products of a sum.
        and all(size == 1 for size in layer.kernel.scale.shape[:-1])
        and math.prod(layer.kernel.codes.shape[:-1]) <= _MOST_PRODUCTS
        and _gives_codes(graph, node.inputs[0])
    )


def _gives_codes(graph: Graph, value: int) -> bool:
    if value == 0:
        return False
    node = graph.nodes[value - 1]
    if isinstance(node.operation, Flatten):
        return _gives_codes(graph, node.inputs[0])
    return isinstance(node.operation, Quantize | Sign)


def _run(graph: Graph, node: Node, given: list[Array | _Codes], for_cpu: bool) -> Array | _Codes:
    operation, x = node.operation, given[0]
    if isinstance(x, _Codes):
        if isinstance(operation, Flatten):
            return dataclasses.replace(x, codes=x.codes.reshape(x.codes.shape[0], -1))
        if isinstance(operation, Convolution | Dense) and _in_integers(graph, node):
            return _layer(operation, x, for_cpu)
    floats = [one.values() if isinstance(one, _Codes) else one for one in given]
    match operation:
        case Quantize(quantizer, limit):
            codes = quantizer.codes(floats[0], limit)
            offset = 128 if quantizer.levels[1] > 127 else 0
            codes = (codes.astype(jnp.int32) - offset).astype(jnp.int8)
            return _Codes(codes, offset, quantizer.scale(limit))
        case Sign():
            return _Codes(jnp.where(floats[0] >= 0, 1, -1).astype(jnp.int8), 0, jnp.float32(1))
    return apply(operation, floats)


def _layer(layer: Convolution | Dense, x: _Codes, for_cpu: bool) -> Array:
    """The layer's output in float32, of one sum of products of integers."""
    kernel = layer.kernel
    assert isinstance(kernel, Quantized)
    if isinstance(layer, Convolution):
        # What surrounds the image is the code of zero.
        padding = ((0, 0), *layer.padding, (0, 0))
        padded = jnp.pad(x.codes, padding, constant_values=np.int8(-x.offset))

        def product(codes: Array) -> Array:
            return _convolved(padded, codes, layer.strides, layer.groups, for_cpu)
    else:

        def product(codes: Array) -> Array:
            return jnp.matmul(x.codes, codes, preferred_element_type=jnp.int32)

    sums = product(kernel.codes)
    # (x + offset) (w - zero) = x w + offset (w - zero) - x zero, each summed.
    if kernel.zero_point is not None:
        zero_point = by_channel(kernel.zero_point.astype(jnp.int32).ravel(), sums.ndim)
        sums -= product(jnp.ones_like(kernel.codes)) * zero_point
    if x.offset:
        sums += by_channel(jnp.asarray(x.offset * _sums_of_offsets(kernel)), sums.ndim)
    scale = x.scale * kernel.scale.reshape(-1).astype(jnp.float32)
    return plus(sums.astype(jnp.float32) * by_channel(scale, sums.ndim), layer.bias)


def _sums_of_offsets(kernel: Quantized) -> np.ndarray:
    """Codes less their zero points, summed by channel out: int32 [channels out].

    In numpy, since they are constants: XLA takes seconds to fold such a sum of a large kernel.
    """
    offsets = np.asarray(kernel.codes, np.int32)
    if kernel.zero_point is not None:
        offsets = offsets - np.asarray(kernel.zero_point, np.int32)
    return offsets.sum(axis=tuple(range(offsets.ndim - 1)), dtype=np.int32)


def _convolved(
    x: Array, kernel: Array, strides: tuple[int, int], groups: int, for_cpu: bool
) -> Array:
    """Sums of products, int32 [batch, height, width, channels out], of two int8, unpadded."""
    height, width, channels, features = kernel.shape
    if not for_cpu or (groups > 1 and channels > 1):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            preferred_element_type=jnp.int32,
        )
    rows, columns = ((x.shape[i + 1] - kernel.shape[i]) // strides[i] + 1 for i in range(2))
    taps = [
        lax.slice(
            x,
            (0, i, j, 0),
            (
                x.shape[0],
                i + strides[0] * (rows - 1) + 1,
                j + strides[1] * (columns - 1) + 1,
                x.shape[3],
            ),
            (1, *strides, 1),
        )
        for i in range(height)
        for j in range(width)
    ]
    if groups == 1:
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, height * width * channels)
        sums = jnp.matmul(patches, kernel.reshape(-1, features), preferred_element_type=jnp.int32)
        return sums.reshape(x.shape[0], rows, columns, features)
    # Depthwise: each channel has features / groups kernels, which follow one another.
    kernels = kernel.reshape(height * width, features).astype(jnp.int32)
    sums = jnp.zeros((x.shape[0], rows, columns, features), jnp.int32)
    for tap, one in zip(taps, kernels, strict=True):
        repeated = jnp.repeat(tap.astype(jnp.int32), features // groups, axis=-1)
        sums += repeated * by_channel(one, 4)
    return sums
