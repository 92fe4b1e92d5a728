"""What docs/frameworks.md shows of activations is run, and its table is the one that is printed."""

import dataclasses
import re
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ab_jax as ab
from ab_jax import nnx as ab_nnx
from ab_jax.activations import ActivationQuantizer
from ab_jax.products import (
    ActivationRules,
    describe_products,
    initial_ranges,
    measure_ranges,
    quantize_inputs,
)
from tests.products.networks_of_frameworks import NETWORKS, drawn

PAGE = (Path(__file__).parents[2] / "docs/frameworks.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"## Activations\n(.*?)\n## ", PAGE, re.DOTALL)
EIGHT = ActivationRules([(".*", ActivationQuantizer(bits=8))])
IMAGES = drawn(5, 16, 8)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(6, name="stem")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.net = nnx.Dict(head=nnx.Linear(6, 3, rngs=rngs))

    def __call__(self, x):
        return self.net.head(nnx.relu(self.norm(self.stem(x))))


def haiku_network(x):
    return hk.nets.MLP([6, 3])(x)


@pytest.fixture(scope="module")
def names():
    model = Nnx(nnx.Rngs(0))
    names = {
        **{"nnx": nnx, "ab_nnx": ab_nnx, "hk": hk, "eqx": eqx, "jax": jax, "jnp": jnp},
        **{"optax": optax, "ab": ab, "ActivationRules": ActivationRules},
        **{"ActivationQuantizer": ActivationQuantizer, "images": IMAGES},
        "linen_model": Linen(),
        "haiku_network": haiku_network,
        "equinox_model": eqx.nn.MLP(8, 3, 6, 1, key=jax.random.key(0)),
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param),
        "labels": jnp.arange(16) % 3,
        "rules": ab.Rules([(".*kernel", ab.Uniform(bits=4)), (".*", None)]),
        "before": nnx.to_pure_dict(nnx.state(model)),
    }
    for block in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL):
        exec(block, names)
    return names


@pytest.mark.parametrize("framework", ["linen", "haiku", "equinox", "nothing"])
def test_a_line_makes_a_function_of_each_framework(names, framework):
    forward, params = {
        "linen": (
            names["of_linen"],
            names["linen_model"].init(jax.random.key(0), IMAGES)["params"],
        ),
        "haiku": (
            names["haiku_forward"],
            hk.transform(haiku_network).init(jax.random.key(0), IMAGES),
        ),
        "equinox": (names["of_equinox"], names["params_of_equinox"]),
        "nothing": (names["of_nothing"], {"in": drawn(0, 8, 6), "out": drawn(1, 6, 3)}),
    }[framework]
    ranges = initial_ranges(forward, EIGHT, params, IMAGES)
    assert len(ranges) == 2
    at_0, ranges = quantize_inputs(forward, EIGHT)(
        params, IMAGES, ranges=ranges, alpha=0.0, measure=True
    )
    np.testing.assert_allclose(at_0, forward(params, IMAGES), rtol=1e-6)
    at_1, _ = quantize_inputs(forward, EIGHT)(params, IMAGES, ranges=ranges)
    np.testing.assert_allclose(at_1, at_0, atol=0.05 * np.abs(at_0).max())
    assert np.any(at_1 != at_0)


def test_a_linen_module_is_called_as_before(names):
    limits = names["state"]["activation_ranges"]
    np.testing.assert_allclose(limits["stem"]["kernel"], np.abs(IMAGES).max())
    params = names["params"]
    plain = names["linen_model"].apply({"params": params}, IMAGES)
    np.testing.assert_allclose(names["outputs"], plain, atol=0.3 * np.abs(plain).max())
    assert np.any(names["outputs"] != plain)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(names["grads"]))


def test_the_nnx_step_moves_the_model_its_statistics_and_the_ranges(names):
    before, after = names["before"], nnx.to_pure_dict(nnx.state(names["model"]))
    for path in (("stem", "kernel"), ("norm", "mean")):
        one, other = before, after
        for key in path:
            one, other = one[key], other[key]
        assert np.any(one != other), path
    ranges = names["ranges"].get_value()
    assert ranges.keys() == {"stem/kernel"}  # the head is left as it is
    np.testing.assert_allclose(ranges["stem/kernel"].limit, np.abs(IMAGES).max(), rtol=1e-6)
    assert names["logits"].shape == (16, 3)


def test_a_module_that_rests_is_measured_and_left_alone(names):
    model = names["model"]
    model.eval()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    inputs = ActivationRules([(".*", ActivationQuantizer(bits=8))])
    ranges = ab_nnx.measure_ranges(model, inputs, [(IMAGES,), (2 * IMAGES,)])
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    limit = ranges.get_value()["stem/kernel"].limit
    np.testing.assert_allclose(limit, 2 * np.abs(IMAGES).max())
    described = ab_nnx.describe_products(model, IMAGES, input_rules=inputs, ranges=ranges)
    assert [row.product.address for row in described.rows] == ["stem/kernel", "net/head/kernel"]
    with pytest.raises(TypeError, match=r"InputRanges, not dict.*initial_ranges or measure"):
        ab_nnx.quantize_inputs(model, inputs, ranges.get_value())


def decoder_table() -> str:
    f, params, inputs = NETWORKS["nnx_decoder"]()
    rules = ab.Rules([(r".*(kernel|embedding)", ab.Uniform(bits=4)), (".*", None)])
    of_inputs = ActivationRules(
        [
            (r"product#1/product", ActivationQuantizer(bits=8, signed=False, limit=1.0)),
            (r".*", ActivationQuantizer(bits=8)),
        ]
    )
    found = describe_products(f, params, *inputs, rules=rules, input_rules=of_inputs)
    rows = [
        dataclasses.replace(row, product=dataclasses.replace(row.product, where="decoder.py"))
        for row in found.rows
    ]
    lookups = dict.fromkeys(found.lookups, "decoder.py")
    return str(dataclasses.replace(found, rows=tuple(rows), lookups=lookups))


def test_the_decoders_table_is_the_one_that_is_printed():
    (shown,) = re.findall(r"<!-- decoder_products -->\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert shown.splitlines() == decoder_table().splitlines()


def test_measured_ranges_of_a_model_that_rests_suit_its_activations(names):
    forward, params = names["of_nothing"], {"in": drawn(0, 8, 6), "out": drawn(1, 6, 3)}
    ranges = measure_ranges(forward, EIGHT, params, [(IMAGES,)])
    np.testing.assert_allclose(ranges["out"].limit, np.abs(np.tanh(IMAGES @ params["in"])).max())
