"""Batch norm folded into the layer before it: its scale and shift cost nothing any more.

Where an `Affine` directly follows a convolution or a dense layer, and nothing else takes what that
layer gives, `(codes * scale) * gamma + shift` is `codes * (scale * gamma)` with a bias. A negative
gamma negates its channel's codes, so that scales stay positive; the integers are otherwise as
training left them. Elsewhere (after a pooling, after a sum) the `Affine` stays.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from ab_jax.export.graph import (
    Affine,
    Convolution,
    Dense,
    Graph,
    Node,
    Weights,
    by_channel,
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
    bias = norm.shift if layer.bias is None else layer.bias * norm.scale + norm.shift
    return dataclasses.replace(layer, kernel=_scaled(layer.kernel, norm.scale), bias=bias)


def _scaled(weights: Weights, gamma: Array) -> Weights:
    """Weights whose output channels, the last axis, are multiplied by gamma [channels]."""
    if not isinstance(weights, Quantized):
        return weights * by_channel(gamma, weights.ndim)
    gamma = by_channel(gamma, weights.codes.ndim)
    negative = gamma < 0
    codes, zero_point = weights.codes, weights.zero_point
    if zero_point is None:
        codes = jnp.where(negative, -codes, codes)
    else:
        # The complement, -1 - c, negates the difference of the two and stays within their range,
        # which has one negative number more than positive ones.
        codes = jnp.where(negative, ~codes, codes)
        zero_point = jnp.where(negative, ~zero_point, zero_point)
    scale = weights.scale * jnp.abs(gamma).astype(weights.scale.dtype)
    if zero_point is not None:
        zero_point = jnp.broadcast_to(zero_point, scale.shape)
    return dataclasses.replace(weights, codes=codes, scale=scale, zero_point=zero_point)
