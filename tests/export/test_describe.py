"""Graphs of our models: their logits and integers, with batch norm folded, and in integers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.export.describe import describe
from ab_jax.export.fold import fold_batch_norm
from ab_jax.export.graph import Convolution, Dense, Graph, Quantize, evaluate
from ab_jax.export.integers import evaluate_in_integers, layers_in_float
from ab_jax.quantized_inputs import keep_input
from ab_jax.quantizers import Quantized
from tests.export.networks import NETWORKS, Network, make
from tests.fast_compilation import compiled

IMAGES = 16


def layers(graph: Graph) -> dict[str, Convolution | Dense]:
    return {
        node.name: node.operation
        for node in graph.nodes
        if isinstance(node.operation, Convolution | Dense)
    }


def quantized_leaves(variables: dict[str, Any]) -> dict[str, Quantized]:
    """By the path of their layer."""
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(
            variables["params"], is_leaf=lambda leaf: isinstance(leaf, Quantized)
        )
        if isinstance(leaf, Quantized)
    }


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, rng: np.random.Generator) -> Network:
    return make(request.param, rng)


def test_a_graph_is_its_model(rng: np.random.Generator, network: Network) -> None:
    model, variables, shape = network
    images = jnp.asarray(rng.normal(size=(IMAGES, *shape)), jnp.float32)
    graph = describe(model, variables, shape)
    found = layers(graph)
    for name, leaf in quantized_leaves(variables).items():
        assert found.pop(name).kernel is leaf
    assert not found

    def model_logits(images: jax.Array) -> jax.Array:
        return model.apply(ab.dequantize(variables), images, train=False)

    expected = compiled(model_logits, images)
    agree(compiled(lambda x: evaluate(graph, x), images), expected)
    folded = fold_batch_norm(graph)
    # The first layer of BinaryNet with signs sees images as they are.
    assert layers_in_float(folded) == (["conv0"] if "sign" in str(model.activation) else [])
    agree(compiled(lambda x: evaluate_in_integers(folded, x), images), expected)


def agree(found: jax.Array, expected: jax.Array) -> None:
    """Rounding may move a value from one code to the next, which is seen in an image's logits."""
    largest = np.abs(expected).max()
    differences = np.abs(found - expected).max(axis=1)
    assert np.mean(differences < 1e-5 * largest) > 0.6
    assert differences.max() < 0.1 * largest
