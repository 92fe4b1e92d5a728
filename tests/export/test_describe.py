"""Graphs of our models: the same logits and integers, with batch norm folded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.export.describe import describe
from ab_jax.export.fold import fold_batch_norm
from ab_jax.export.graph import Affine, Convolution, Dense, Graph, Node, evaluate
from ab_jax.quantizers import Quantized
from tests.export.networks import NETWORKS, make

BATCH = 4


def layers(graph: Graph) -> dict[str, Convolution | Dense]:
    return {
        node.name: node.operation
        for node in graph.nodes
        if isinstance(node.operation, Convolution | Dense)
    }


def codes_of(variables: dict) -> dict[str, Quantized]:
    leaves = jax.tree.leaves_with_path(
        variables["params"], is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): leaf
        for path, leaf in leaves
        if isinstance(leaf, Quantized)
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_computes_what_its_model_does(rng: np.random.Generator, name: str) -> None:
    model, variables, shape = make(name, rng)
    images = jnp.asarray(rng.normal(size=(BATCH, *shape)), jnp.float32)
    graph = describe(model, variables, shape)
    folded = fold_batch_norm(graph)
    expected = jax.jit(lambda v, x: model.apply(ab.dequantize(v), x, train=False))(
        variables, images
    )
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(
        jax.jit(lambda x: evaluate(graph, x))(images), expected, rtol=0, atol=1e-5 * largest
    )
    np.testing.assert_allclose(
        jax.jit(lambda x: evaluate(folded, x))(images), expected, rtol=0, atol=1e-5 * largest
    )
