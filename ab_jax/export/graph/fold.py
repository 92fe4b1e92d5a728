"""Batch norm folded into the layer before it: its scale and shift cost nothing any more.

Where an `Affine` directly follows a convolution or a dense layer, and nothing else takes what that
layer gives, `(codes * scale) * gamma + shift` is `codes * (scale * gamma)` with a bias. A negative
gamma negates its channel's codes, so that scales stay positive; the integers are otherwise as
training left them. Elsewhere (after a pooling, after a sum) the `Affine` stays.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ab_jax.export.graph.operations import (
    Affine,
    Convolution,
    Dense,
    Graph,
    Node,
    Weights,
)
from ab_jax.quantizers import Quantized


def fold_batch_norm(graph: Graph) -> Graph:
    """The graph without batch norms that directly follow a layer; its logits differ by rounding.

    A scale by tensor becomes one by channel. A channel whose gamma is 0 gets the scale 0.
    """
    places = {0: 0}  # of a value of the graph among those of the folded one
    nodes: list[Node] = []
    for i, node in enumerate(graph.nodes):
        inputs = tuple(places[value] for value in node.inputs)
        before = nodes[inputs[0] - 1] if inputs[0] else node
        if (
            isinstance(node.operation, Affine)
            and isinstance(before.operation, Convolution | Dense)
            and graph.users(node.inputs[0]) == [i]
        ):
            operation = _folded(before.operation, node.operation)
            nodes[inputs[0] - 1] = dataclasses.replace(before, operation=operation)
            places[i + 1] = inputs[0]
        else:
            nodes.append(dataclasses.replace(node, inputs=inputs))
            places[i + 1] = len(nodes)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _folded(layer: Convolution | Dense, norm: Affine) -> Convolution | Dense:
    # In numpy, since JAX would compile each line for each shape.
    scale, shift = np.asarray(norm.scale), np.asarray(norm.shift)
    bias = shift if layer.bias is None else np.asarray(layer.bias) * scale + shift
    return dataclasses.replace(layer, kernel=_scaled(layer.kernel, scale), bias=jnp.asarray(bias))


def _scaled(weights: Weights, gamma: np.ndarray) -> Weights:
    """Weights whose output channels, the last axis, are multiplied by gamma [channels]."""
    if not isinstance(weights, Quantized):
        return jnp.asarray(np.asarray(weights) * gamma)
    codes, zero_point = np.asarray(weights.codes), weights.zero_point
    if zero_point is None:
        codes = np.where(gamma < 0, -codes, codes)
    else:
        # The complement, -1 - c, negates the difference of the two and stays within their range,
        # which has one negative number more than positive ones.
        codes = np.where(gamma < 0, ~codes, codes)
        zero_point = jnp.asarray(np.where(gamma < 0, ~np.asarray(zero_point), zero_point))
    return dataclasses.replace(
        weights,
        codes=jnp.asarray(codes),
        scale=jnp.asarray(np.asarray(weights.scale) * np.abs(gamma)),
        zero_point=zero_point,
    )
