"""Weights whose sharding is part of their type, as `jax.make_mesh` makes it by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ab_jax as ab

SLOW = [
    *(
        ab.Binary(),
        ab.Ternary(),
        ab.Ternary(scale="absmean", group_size=8),
        ab.Uniform(bits=4, symmetric=False),
        ab.Uniform(bits=4, axis=None),
    ),
    *(ab.LeastSquaresBinary(bits=2), ab.LeastSquaresBinary(bits=3), ab.Ternary(group_size=8)),
]
QUANTIZERS = [
    *(ab.Uniform(bits=4, scale="absmax"), ab.Uniform(bits=3, group_size=16)),
    ab.Ternary(scale="absmean"),
    *(pytest.param(quantizer, marks=pytest.mark.long) for quantizer in SLOW),
]


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_weights_of_explicit_sharding_blend_as_whole_ones(rng, devices, quantizer, spec):
    w = rng.normal(size=(64, 32)).astype(np.float32)
    rules = ab.Rules([(".*", quantizer)])

    def loss(tree):
        return jnp.sum(ab.blend(tree, rules, 0.5)["kernel"] ** 2)

    whole = ab.quantize({"kernel": w}, rules)["kernel"]
    gradient = jax.grad(loss)({"kernel": w})["kernel"]
    with jax.set_mesh(jax.make_mesh((4,), ("x",), devices=devices[:4])):
        tree = {"kernel": jax.device_put(w, NamedSharding(jax.sharding.get_mesh(), spec))}
        assert str(ab.describe(tree, rules)) == str(ab.describe({"kernel": w}, rules))
        found = ab.quantize(tree, rules)["kernel"]
        assert found.codes.sharding.spec == spec
        of_sharded = jax.jit(jax.grad(loss))(tree)["kernel"]
        assert of_sharded.sharding.spec == spec
    # Sums in another order: scales differ in their last bits, and codes half way between two.
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1 if one.dtype == np.int8 else 0)
    assert np.mean(np.asarray(found.codes) != np.asarray(whole.codes)) < 0.01
    assert np.mean(~np.isclose(of_sharded, gradient, rtol=1e-4, atol=1e-5)) < 0.01


MANY_CANDIDATES = [
    *(ab.Uniform(bits=8), ab.Uniform(bits=5, symmetric=False)),
    pytest.param(ab.Uniform(bits=8, symmetric=False), marks=pytest.mark.long),
    pytest.param(ab.Uniform(bits=8, group_size=8), marks=pytest.mark.long),
]


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")], ids=str)
@pytest.mark.parametrize("quantizer", MANY_CANDIDATES, ids=repr)
def test_fits_of_many_scales_lose_as_little(rng, devices, quantizer, spec):
    """Scales that lose the same to the last bits may be far apart: errors are compared."""
    w = rng.normal(size=(64, 16)).astype(np.float32)
    whole = np.asarray(quantizer.quantize(w).dequantize())
    with jax.set_mesh(jax.make_mesh((8,), ("x",), devices=devices)):
        found = jax.jit(quantizer.quantize)(jax.device_put(w, spec))
        values = np.asarray(found.dequantize())
    assert found.codes.sharding.spec == spec
    errors = (np.square(w - of).sum(0) for of in (values, whole))
    np.testing.assert_allclose(*errors, rtol=1e-3)


@pytest.mark.parametrize("spec", [P("x", None, None), P(None, None, "x")], ids=str)
def test_groups_of_several_axes_too(rng, devices, spec):
    """Groups of two heads, on devices that hold two each, or a part of the features."""
    w = rng.normal(size=(8, 4, 32)).astype(np.float32)
    quantizer = ab.Uniform(bits=4, scale="absmax", group_size=8, group_axis=(0, 1))
    whole = quantizer.quantize(w)
    with jax.set_mesh(jax.make_mesh((4,), ("x",), devices=devices[:4])):
        found = quantizer.quantize(jax.device_put(w, spec))
        values = found.dequantize()
    assert found.codes.sharding.spec == spec
    np.testing.assert_array_equal(found.codes, whole.codes)
    np.testing.assert_allclose(values, whole.dequantize(), rtol=1e-6)


def test_trained_scales_of_groups_too(rng, devices):
    w = rng.normal(size=(64, 32)).astype(np.float32)
    rules = ab.Rules([(".*", ab.Uniform(bits=4, group_size=16))])
    scales = ab.initial_scales({"kernel": w}, rules)
    value = ab.blend({"kernel": w}, rules, 1.0, estimator=ab.learned_step_size, scales=scales)
    with jax.set_mesh(jax.make_mesh((4,), ("x",), devices=devices[:4])):
        tree = {"kernel": jax.device_put(w, P(None, "x"))}
        own = ab.initial_scales(tree, rules)
        found = ab.blend(tree, rules, 1.0, estimator=ab.learned_step_size, scales=own)
    np.testing.assert_allclose(own["kernel"], scales["kernel"], rtol=1e-5)
    np.testing.assert_allclose(found["kernel"], value["kernel"], rtol=1e-5)


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")], ids=str)
def test_fits_of_explicit_sharding_are_carried(rng, devices, spec):
    old, new = rng.normal(size=(2, 64, 32)).astype(np.float32)
    rules = ab.Rules([(".*", ab.Uniform(bits=3, group_size=16, scale="absmax"))])

    def loss(tree, fits):
        return jnp.sum(ab.blend(tree, rules, 0.5, fits=fits)["kernel"] ** 2)

    wanted = jax.grad(loss)({"kernel": new}, ab.fit({"kernel": old}, rules))["kernel"]
    with jax.set_mesh(jax.make_mesh((4,), ("x",), devices=devices[:4])):
        tree, later = ({"kernel": jax.device_put(w, spec)} for w in (old, new))
        found = jax.jit(jax.grad(loss))(later, ab.fit(tree, rules))["kernel"]
    assert found.sharding.spec == spec
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_trained_scales_of_groups_on_several_devices(rng, devices):
    w = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)
    rules = ab.Rules([(".*", ab.Uniform(bits=4, group_size=8))])

    def loss(tree, scales):
        value = ab.blend(tree, rules, 1.0, estimator=ab.learned_step_size, scales=scales)
        return jnp.sum(value["kernel"] ** 2)

    gradient = jax.grad(loss, (0, 1))
    scales = ab.initial_scales({"kernel": w}, rules)
    wanted = gradient({"kernel": w}, scales)
    with jax.set_mesh(jax.make_mesh((4,), ("d",), devices=devices[:4])):
        tree = {"kernel": jax.device_put(w, P("d", None))}
        own = ab.initial_scales(tree, rules)
        for found in (gradient(tree, own), jax.jit(gradient)(tree, own)):
            assert found[0]["kernel"].sharding.spec == P("d", None)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
