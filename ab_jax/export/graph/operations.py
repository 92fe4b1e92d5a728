"""A network as a graph of operations: what exporters read, in place of a model's code.

A `Graph` is a list of nodes in the order they run; a node takes the images or what earlier nodes
gave. The operations are those of inference at alpha 1, and few: whoever writes a format needs one
rule for each. `known_networks` beside it makes the graph of a model, `fold` absorbs its batch
norms, `ab_jax.export.integers` runs it in integers, and `evaluate` here says what it means, in
float32.

Arrays are [batch, height, width, channels] between convolutions, [batch, features] between dense
layers, all float32; a `Quantize` gives out the values of its codes.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from ab_jax.activations import ActivationQuantizer
from ab_jax.quantized import BinaryCoded, Quantized

Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after, along height and along width
Weights = Quantized | Array


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """A two-dimensional convolution, without dilation.

    Attributes:
      kernel: [height, width, channels in / groups, channels out].
      bias: float32 [channels out], or None.
      strides: along height and along width.
      padding: zeros around the input.
      groups: of channels, each convolved by itself.
    """

    kernel: Weights
    bias: Array | None
    strides: tuple[int, int]
    padding: Pads
    groups: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A product with a kernel [features in, features out], plus a bias [features out] or None."""

    kernel: Weights
    bias: Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """`x * scale + shift` by channel, both float32 [channels]: a batch norm at inference."""

    scale: Array
    shift: Array


@dataclasses.dataclass(frozen=True)
class Quantize:
    """The nearest of evenly spaced levels; `quantizer` knows them, up to `limit`, positive."""

    quantizer: ActivationQuantizer
    limit: float


@dataclasses.dataclass(frozen=True)
class Clip:
    """`min(max(x, 0), high)`: ReLU where high is infinite, ReLU6 where it is 6."""

    high: float


@dataclasses.dataclass(frozen=True)
class Sign:
    """-1 or +1; zero counts as +1."""


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """Maxima over windows of an input that `value` surrounds."""

    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Pads
    value: float = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Mean:
    """The average over all positions: [batch, height, width, channels] to [batch, channels]."""


@dataclasses.dataclass(frozen=True)
class Flatten:
    """[batch, height, width, channels] to [batch, features], the channels varying fastest."""


@dataclasses.dataclass(frozen=True)
class Add:
    """The sum of two inputs of one shape."""


@dataclasses.dataclass(frozen=True)
class Subsample:
    """Every `stride`-th position, and `channels` zeros after the channels: a plain shortcut."""

    stride: int
    channels: int


Operation = (
    Convolution
    | Dense
    | Affine
    | Quantize
    | Clip
    | Sign
    | MaxPool
    | Mean
    | Flatten
    | Add
    | Subsample
)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """An operation, its name (that of the model's layer where it is one) and what it takes.

    Attributes:
      inputs: places in the list of values: 0 the images, i what node i - 1 gave.
      shape: of what it gives out, without the batch.
    """

    name: str
    operation: Operation
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A network; the last node gives the logits [batch, classes].

    Attributes:
      nodes: in an order in which each comes after what it takes.
      image_shape: (height, width, channels) of the normalized images.
    """

    nodes: tuple[Node, ...]
    image_shape: tuple[int, int, int]

    def users(self, value: int) -> list[int]:
        """The indices of the nodes that take a value."""
        return [i for i, node in enumerate(self.nodes) if value in node.inputs]


def evaluate(graph: Graph, images: Array) -> Array:
    """Logits, float32 [batch, classes], of normalized float32 images [batch, *image_shape]."""
    check_images(graph, images)
    values = [images]
    for node in graph.nodes:
        values.append(apply(node.operation, [values[i] for i in node.inputs]))
    return values[-1]


def check_images(graph: Graph, images: Array) -> None:
    """Raise ValueError unless these are images of the graph's shape, and floating point."""
    if images.shape[1:] != graph.image_shape or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"The network takes normalized images [batch, {', '.join(map(str, graph.image_shape))}]"
            f", not {images.dtype}{list(images.shape)}."
        )


def apply(operation: Operation, inputs: Sequence[Array]) -> Array:
    """What an operation gives out, in floating point."""
    x = inputs[0]
    match operation:
        case Convolution(kernel, bias, strides, padding, groups):
            y = lax.conv_general_dilated(
                x,
                values_of(kernel),
                strides,
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            return plus(y, bias)
        case Dense(kernel, bias):
            y = x @ values_of(kernel)
            return plus(y, bias)
        case Affine(scale, shift):
            return plus(x * by_channel(scale, x.ndim), shift)
        case Quantize(quantizer, limit):
            return quantizer(x, limit, 1.0)
        case Clip(high):
            return jnp.clip(x, 0, high)
        case Sign():
            return jnp.where(x >= 0, 1.0, -1.0).astype(x.dtype)
        case MaxPool(window, strides, padding, value):
            surrounded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=value)
            return nn.max_pool(surrounded, window, strides, "VALID")
        case Mean():
            return x.mean((1, 2))
        case Flatten():
            return x.reshape(x.shape[0], -1)
        case Add():
            return x + inputs[1]
        case Subsample(stride, channels):
            return jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(0, channels)])


def by_channel(values: Array, ndim: int) -> Array:
    """Values [channels] in the shape of an array of so many axes, the last that of the channels."""
    return values.reshape((1,) * (ndim - 1) + (-1,))


def plus(x: Array, bias: Array | None) -> Array:
    """x plus a bias by channel, if there is one."""
    return x if bias is None else x + by_channel(bias, x.ndim)


def values_of(weights: Weights) -> Array:
    """The floating-point values of weights, quantized or not."""
    return weights.dequantize() if isinstance(weights, Quantized) else weights


def shape_of(weights: Weights) -> tuple[int, ...]:
    """The shape of weights, quantized or not."""
    return weights.codes.shape if isinstance(weights, Quantized) else weights.shape


def check_one_scale(name: str, weights: Weights) -> None:
    """Refuse weights with a scale for each bit: no integer product has them.

    Raises:
      ValueError: names the weights and the formats that do hold them.
    """
    if isinstance(weights, BinaryCoded):
        raise ValueError(
            f"{name} has a scale for each of its {weights.bits} bits, as LeastSquaresBinary gives "
            f"them, where this format holds one scale and evenly spaced levels. Write a packed "
            f"file or StableHLO, or quantize it with Binary or Uniform."
        )
