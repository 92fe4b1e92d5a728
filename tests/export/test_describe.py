"""Graphs of our models: their logits and integers, with batch norm folded, and in integers."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.graph.fold import fold_batch_norm
from ab_jax.export.graph.known_networks import describe
from ab_jax.export.graph.operations import Affine, Convolution, Dense, Graph, evaluate, values_of
from ab_jax.export.integers import evaluate_in_integers, layers_in_float
from ab_jax.linen import RANGES, WithQuantizedInputs
from ab_jax.models.binarynet import BinaryNet
from ab_jax.products import ActivationRules
from ab_jax.quantizers import Quantized
from tests.export.small_networks import CASES, Network, make
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


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def network(name: str, rng: np.random.Generator) -> Network:
    return make(name, rng)


def test_a_graph_is_its_model(rng: np.random.Generator, name: str, network: Network) -> None:
    model, variables, shape = network
    images = jnp.asarray(rng.normal(size=(IMAGES, *shape)), jnp.float32)
    graph = describe(model, variables, shape)
    found = layers(graph)
    for layer, leaf in quantized_leaves(variables).items():
        assert found.pop(layer).kernel is leaf
    assert not found

    def model_logits(images: jax.Array) -> jax.Array:
        return model.apply(ab.dequantize(variables), images, train=False)

    expected = compiled(model_logits, images)
    agree(compiled(lambda x: evaluate(graph, x), images), expected)
    folded = fold_batch_norm(graph)
    # The first layer of BinaryNet with signs sees images as they are.
    assert layers_in_float(folded) == (["conv0"] if "sign" in name else [])
    agree(compiled(lambda x: evaluate_in_integers(folded, x), images), expected)


def agree(found: jax.Array, expected: jax.Array) -> None:
    """Rounding may move a value from one code to the next, which is seen in an image's logits."""
    largest = np.abs(expected).max()
    differences = np.abs(found - expected).max(axis=1)
    assert np.mean(differences < 1e-5 * largest) > 0.6
    assert differences.max() < 0.1 * largest


#: Batch norms that follow a pooling, the images' sum or nothing of a layer's own.
UNFOLDED = {
    "binarynet": r"conv[135]_norm",
    "binarynet, sign": r"conv[135]_norm",
    "resnet v2": r"(?!stage0_block0/).*(in|out)put_norm",  # no pooling between it and the stem
    "resnet v2, keras": r".*(in|out)put_norm",
}


def test_folding_scales_channels_and_negates_codes(name: str, network: Network) -> None:
    graph = describe(*network)
    folded = fold_batch_norm(graph)
    norms = {
        node.name: node.operation for node in graph.nodes if isinstance(node.operation, Affine)
    }
    left = {node.name for node in folded.nodes if isinstance(node.operation, Affine)}
    pattern = UNFOLDED.get(name, "none")
    assert left == {name for name in norms if re.fullmatch(pattern, name)}
    before = layers(graph)
    negated = 0
    for path, layer in layers(folded).items():
        old, after = before[path], f"{path}_norm"
        if path == "stem" and after not in norms:
            after = "stage0_block0/input_norm"
        norm = norms.get(after)
        if norm is None or after in left:
            assert layer is old
            continue
        gain, shift = (np.asarray(part, np.float64) for part in (norm.scale, norm.shift))
        values = np.asarray(values_of(layer.kernel), np.float64)
        expected = np.asarray(values_of(old.kernel), np.float64) * gain
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=0)
        bias = 0 if old.bias is None else np.asarray(old.bias, np.float64)
        np.testing.assert_allclose(layer.bias, bias * gain + shift, rtol=1e-6, atol=1e-6)
        assert isinstance(layer.kernel, Quantized)
        assert isinstance(old.kernel, Quantized)
        assert np.all(layer.kernel.scale > 0)
        codes = np.asarray(old.kernel.codes)
        turned = ~codes if old.kernel.zero_point is not None else -codes
        np.testing.assert_array_equal(layer.kernel.codes, np.where(gain < 0, turned, codes))
        negated += int(np.sum(gain < 0))
    assert negated > 0


def test_what_cannot_be_described_is_named(rng: np.random.Generator) -> None:
    model, variables, shape = make("binarynet", rng)
    with pytest.raises(ValueError, match="Dense is none of the models that can be described"):
        describe(nn.Dense(3), variables, shape)
    with pytest.raises(ValueError, match=r"activation <.*> cannot be described"):
        describe(BinaryNet(activation=lambda x, alpha: x), variables, shape)
    with pytest.raises(ValueError, match=r"quantize_input is <.*>, which cannot be described"):
        describe(BinaryNet(quantize_input=lambda *args: args[2]), variables, shape)
    missing = {**variables, "batch_stats": {}}
    with pytest.raises(ValueError, match="no conv0_norm in the batch_stats"):
        describe(model, missing, shape)
    kernel = nn.LogicallyPartitioned(variables["params"]["conv0"]["kernel"], (None,) * 4)
    boxed = {"params": {**variables["params"], "conv0": {"kernel": kernel}}}
    with pytest.raises(ValueError, match=r"params/conv0/kernel is a Log.*flax\.linen\.unbox"):
        describe(model, {**variables, **boxed}, shape)
    with pytest.raises(ValueError, match=r"conv0 does not take an input \[1, 8, 8, 4\]"):
        describe(model, variables, (8, 8, 4))
    with pytest.raises(ValueError, match=r"takes normalized images \[batch, 8, 8, 3\], not uint8"):
        evaluate(describe(model, variables, shape), jnp.zeros((1, 8, 8, 3), jnp.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_range_that_is_not_finite_is_refused_by_name(
    rng: np.random.Generator, value: float
) -> None:
    """Not left out: the input would stay in float."""
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 8)), jnp.float32)
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8, signed=False))])
    variables = {
        "params": {"conv0": {"kernel": kernel}},
        RANGES: {"conv0": {"kernel": jnp.float32(value)}},
    }
    with pytest.raises(ValueError, match=f"range of the input of conv0 is {value}. Measure it"):
        describe(WithQuantizedInputs(BinaryNet(), rules), variables, (8, 8, 3))


def test_a_kernel_with_a_scale_for_each_bit_is_refused_by_name(rng: np.random.Generator) -> None:
    kernel = ab.LeastSquaresBinary(bits=2).quantize(rng.normal(size=(3, 3, 3, 8)))
    with pytest.raises(
        ValueError, match=r"conv0/kernel has a scale for each of its 2 bits.* Write a packed file"
    ):
        describe(BinaryNet(), {"params": {"conv0": {"kernel": kernel}}}, (8, 8, 3))
