"""What a description of products tells, and of what it warns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.products import ActivationRules, describe_products, measure_ranges
from tests.products.networks_of_frameworks import NETWORKS, drawn

FOUR = ab.Uniform(bits=4)


def notes(description):
    return {row.product.address: row.notes for row in description.rows if row.notes}


def test_channels_of_stacks_heads_and_tables_are_proposed():
    """Taken as proposed, no slice of a weight is without a scale of its own."""
    for name in ("linen_scan_of_layers", "nnx_decoder", "equinox_attention"):
        f, params, inputs = NETWORKS[name]()
        rules = ab.Rules([(".*(bias|scale)", None), (".*", FOUR)])
        found = describe_products(f, params, *inputs, rules=rules)
        assert notes(found)
        assert found.elsewhere == ()
        proposed = {
            row.product.weight: dataclasses.replace(FOUR, axis=row.product.channel_axes)
            for row in found.rows
            if row.weight is not None and row.notes
        }
        better = ab.Rules([*proposed.items(), *rules.rules])
        if name == "equinox_attention":  # whose weights all have their channels first
            better = ab.Rules([*proposed.items(), (".*", None)])
        assert notes(describe_products(f, params, *inputs, rules=better)) == {}

    f, params, inputs = NETWORKS["linen_scan_of_layers"]()
    found = notes(describe_products(f, params, *inputs, rules=rules))
    assert found["layers/attention/query/kernel"] == ("its channels are axis=(0, 2, 3)",)
    assert found["layers/down/kernel"] == ("its channels are axis=(0, 2)",)
    assert "head/kernel" not in found


def test_quantized_norms_and_look_ups_are_told_apart_from_products():
    f, params, inputs = NETWORKS["nnx_decoder"]()
    rules = ab.Rules([(r".*", FOUR)])
    found = describe_products(f, params, *inputs, rules=rules)
    assert found.elsewhere == ("norm/scale",)
    assert set(found.lookups) == {"embedding/embedding"}
    text = str(found)
    assert "norm/scale is quantized, but enters no product" in text
    assert "embedding/embedding is looked up" in text


def test_rules_of_inputs_stand_beside_what_they_meet():
    f, params, inputs = NETWORKS["plain_scan"]()
    rules = ActivationRules(
        [
            (r".*product#1/product", ActivationQuantizer(bits=8, signed=False, limit=1.0)),
            (r".*/product", None),
            (r"layers/in", TokenQuantizer(bits=4)),
            (r".*", ActivationQuantizer(bits=8)),
        ]
    )
    lines = str(describe_products(f, params, *inputs, input_rules=rules)).splitlines()
    (attention,) = (line for line in lines if line.startswith("layers/product#1"))
    assert "product: 8 bits unsigned to 1" in attention
    assert "in: as it is" in attention
    (first,) = (line for line in lines if line.startswith("layers/in "))
    assert "4 bits a token" in first
    assert "networks_of_frameworks.py:" in first


def test_what_no_rule_can_see_and_what_is_cut_off_is_told(rng):
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    params = {"w": drawn(0, 4, 4), "v": drawn(1, 4, 2)}
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    x = jnp.concatenate([x, -x])  # so that there are numbers of both signs wherever it comes
    f = lambda p, x: own(x, p["w"]) @ jnp.ones((4, 4)) @ p["v"]
    rules = ActivationRules([("w", None), ("v", ActivationQuantizer(bits=8, signed=False))])
    with pytest.warns(UserWarning, match="input of v cuts off"):
        ranges = measure_ranges(f, rules, params, [(x,)])
    found = notes(describe_products(f, params, x, input_rules=rules, ranges=ranges))
    assert found["w"] == ("in the body of a custom_vjp_call: its inputs cannot be quantized",)
    assert found["constant"] == ("with a constant: its input stays as it is",)
    hidden = np.asarray(own(x, params["w"]) @ jnp.ones((4, 4)))
    share = np.maximum(-hidden, 0).sum() / np.abs(hidden).sum()
    assert found["v"] == (f"cuts off {share:.1%} of v",)


def test_shapes_are_enough():
    f, params, inputs = NETWORKS["haiku_convolutions"]()
    shapes = jax.eval_shape(lambda: (params, *inputs))
    assert str(describe_products(f, *shapes)) == str(describe_products(f, params, *inputs))
