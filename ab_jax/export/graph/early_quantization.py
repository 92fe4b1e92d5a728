"""Quantization moved to where it costs least: right behind the layer whose output it rounds.

Then that layer can give out codes at once, and what lies between works on codes. The logits stay
the same bit for bit:

- two layers that take one value in the same codes share them;
- codes are taken before a max pooling, not after it: rounding is monotonic, so the largest value
  has the largest code;
- a ReLU before unsigned codes is dropped: they begin at 0 anyway, and end at their limit.
"""

import dataclasses

from ab_jax.export.graph.operations import Clip, Graph, MaxPool, Node, Quantize


def quantize_early(graph: Graph) -> Graph:
    """The graph with each `Quantize` as early as it can be, and without nodes nobody needs."""
    return _without_unused(_without_clips(_before_pools(_shared(graph))))


def _shared(graph: Graph) -> Graph:
    first: dict[object, int] = {}
    places = [0]
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(places[value] for value in node.inputs)
        operation = node.operation
        key = (
            (inputs, operation.quantizer.levels, operation.limit)
            if isinstance(operation, Quantize)
            else len(places)
        )
        if key not in first:
            nodes.append(dataclasses.replace(node, inputs=inputs))
            first[key] = len(nodes)
        places.append(first[key])
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _before_pools(graph: Graph) -> Graph:
    nodes = list(graph.nodes)
    for i, pool in enumerate(graph.nodes):
        users = graph.users(i + 1)
        if not isinstance(pool.operation, MaxPool) or len(users) != 1:
            continue
        quantize = nodes[users[0]]
        # What surrounds the image must have a code, too. Nothing is lower than code 0.
        if _is_unsigned(quantize) and pool.operation.value in (0, -float("inf")):
            before = pool.inputs[0]
            shape = graph.nodes[before - 1].shape if before else graph.image_shape
            nodes[i] = dataclasses.replace(quantize, inputs=pool.inputs, shape=shape)
            nodes[users[0]] = dataclasses.replace(pool, inputs=(i + 1,))
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _without_clips(graph: Graph) -> Graph:
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        operation = node.operation
        if isinstance(operation, Quantize) and _is_unsigned(node) and node.inputs[0]:
            before = nodes[node.inputs[0] - 1]
            if isinstance(before.operation, Clip) and before.operation.high >= operation.limit:
                nodes[i] = dataclasses.replace(node, inputs=before.inputs)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _without_unused(graph: Graph) -> Graph:
    used = {len(graph.nodes)}
    for i in reversed(range(len(graph.nodes))):
        if i + 1 in used:
            used.update(graph.nodes[i].inputs)
    places = {0: 0}
    nodes: list[Node] = []
    for i, node in enumerate(graph.nodes):
        if i + 1 in used:
            nodes.append(dataclasses.replace(node, inputs=tuple(places[v] for v in node.inputs)))
            places[i + 1] = len(nodes)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _is_unsigned(node: Node) -> bool:
    return isinstance(node.operation, Quantize) and not node.operation.quantizer.signed
