"""Blending sharded parameters: the same scales, and no weight sent for a scale per channel."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import ab_jax as ab
from examples.sharded_blend import (
    LAYOUTS,
    QUANTIZERS,
    Config,
    Layout,
    blend_in_place,
    make_mesh,
    place,
    run,
    sent_by,
)

pytestmark = pytest.mark.long

SHAPES = {"conv": (3, 3, 16, 32), "dense": (64, 128)}
FEWEST = min(int(np.prod(shape)) for shape in SHAPES.values()) * 4  # bytes of the smaller kernel
CHANNELS = sum(shape[-1] for shape in SHAPES.values())


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, Any]:
    return {
        name: {"kernel": rng.normal(0, 0.1, shape).astype(np.float32)}
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def mesh(devices: list[jax.Device]) -> Mesh:
    return make_mesh(devices)


def rules_of(name: str) -> ab.Rules:
    return ab.Rules([(r".*/kernel", QUANTIZERS[name])])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_sharded_parameters_blend_as_whole_ones(
    params: dict[str, Any], mesh: Mesh, name: str, layout: Layout
) -> None:
    rules = rules_of(name)
    sharded = place(params, mesh, layout)
    for leaf in jax.tree.leaves(sharded):
        assert all(shard.data.size * 8 == leaf.size for shard in leaf.addressable_shards)
    whole = ab.quantize(params, rules)
    split = jax.jit(lambda tree: ab.quantize(tree, rules))(sharded)
    for layer in SHAPES:
        one, other = whole[layer]["kernel"], split[layer]["kernel"]
        assert one.scale.shape[-1] == SHAPES[layer][-1]
        np.testing.assert_allclose(other.scale, one.scale, rtol=1e-5)
        # A weight half-way between two levels may fall on the other side.
        assert np.mean(np.asarray(one.codes) != np.asarray(other.codes)) < 1e-3
    blended = blend_in_place(sharded, rules)(sharded, 0.25)
    expected = ab.blend(params, rules, 0.25)
    for layer in SHAPES:
        found, wanted = blended[layer]["kernel"], np.asarray(expected[layer]["kernel"])
        assert found.sharding == sharded[layer]["kernel"].sharding
        apart = np.abs(np.asarray(found) - wanted)
        assert np.mean(apart > 1e-5) < 1e-3
    assert all(
        np.array_equal(blend_in_place(sharded, rules)(sharded, 0.0)[k]["kernel"], v["kernel"])
        for k, v in params.items()
    )


@pytest.mark.parametrize("name", QUANTIZERS)
def test_nothing_is_sent_where_channels_are_whole(
    params: dict[str, Any], mesh: Mesh, name: str
) -> None:
    assert sent_by(place(params, mesh, "output channels"), rules_of(name), 0.5) == {}


@pytest.mark.parametrize(
    "quantizer",
    [
        *QUANTIZERS.values(),
        ab.Uniform(bits=8),
        ab.Uniform(bits=4, symmetric=False),
        ab.LeastSquaresBinary(bits=2),
        ab.LeastSquaresBinary(bits=3),
        ab.Uniform(bits=4, group_size=16),
        ab.Ternary(axis=None),
    ],
    ids=repr,
)
def test_sums_alone_are_sent_where_channels_are_spread(
    params: dict[str, Any], mesh: Mesh, quantizer: ab.Quantizer
) -> None:
    rules = ab.Rules([(r".*/kernel", quantizer)])
    sent = sent_by(place(params, mesh, "input channels"), rules, 0.5)
    assert set(sent) == {"all-reduce"}
    if quantizer in (ab.Binary(), ab.Uniform(bits=4, scale="absmax")):
        assert sent["all-reduce"] / 4 / CHANNELS == 1


def test_a_scale_per_tensor_sends_a_few_numbers_too(params: dict[str, Any], mesh: Mesh) -> None:
    rules = ab.Rules([(r".*/kernel", ab.Uniform(bits=4, scale="absmax", axis=None))])
    for layout in LAYOUTS:
        sent = sent_by(place(params, mesh, layout), rules, 0.5)
        assert set(sent) == {"all-reduce"}
        assert sent["all-reduce"] <= 4 * 8 * len(SHAPES)


def test_the_example_prints_a_line_for_each_quantizer_and_layout() -> None:
    table = run(Config())
    assert table.row_count == len(QUANTIZERS) * len(LAYOUTS)
