"""Quantized inputs of weights and data that lie on several devices, on every kind of mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.products import ActivationRules, initial_ranges, quantize_inputs

RULES = ab.Rules([(".*", ab.Uniform(bits=4, scale="absmax"))])
QUANTIZERS = [
    ActivationQuantizer(bits=8),
    ActivationQuantizer(bits=8, percentile=90.0),
    ActivationQuantizer(bits=8, signed=False),
    TokenQuantizer(bits=8),
]
# How the first weight, the second one and the data lie.
LAYOUTS = {
    "data": (P(None, None), P(None, None), P("x", None)),
    "inputs": (P("x", None), P(None, "x"), P(None, "x")),
    "outputs": (P(None, "x"), P("x", None), P(None, None)),
}


def forward(p, x):
    """Shardings that may be explicit want to be told those of results that sum over devices."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    told = {"out_sharding": P()} if explicit else {}
    hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, p["first"], **told))
    return jnp.einsum("bi,io->bo", hidden, p["second"], **told)


def loss(p, ranges, x, rules):
    effective = ab.blend(p, RULES, 0.5)
    y, ranges = quantize_inputs(forward, rules)(effective, x, ranges=ranges, measure=True)
    return jnp.sum(jnp.sin(y)), ranges


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_shared_weights_and_data_compute_what_whole_ones_do(rng, devices, quantizer, layout, kind):
    p = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"first": (8, 16), "second": (16, 4)}.items()
    }
    x = rng.normal(size=(8, 8)).astype(np.float32)
    rules = ActivationRules([(".*", quantizer)])
    gradient = jax.value_and_grad(loss, has_aux=True)
    start = initial_ranges(forward, rules, p, x)
    (wanted, ranges), of_whole = gradient(p, start, x, rules)

    mesh = jax.make_mesh((4,), ("x",), devices=devices[:4], axis_types=(kind,))
    with jax.set_mesh(mesh):
        *of_weights, of_data = LAYOUTS[layout]
        on = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip((*p.values(), x), (*of_weights, of_data), strict=True)
        ]
        shared = dict(zip(p, on, strict=False))
        begun = initial_ranges(forward, rules, shared, on[-1])
        step = jax.jit(gradient, static_argnums=3)
        (found, of_shared), gradients = step(shared, begun, on[-1], rules)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    for one, other in zip(jax.tree.leaves(of_shared), jax.tree.leaves(ranges), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    for name, spec in zip(p, of_weights, strict=True):
        # Half-way between two levels the last bit decides.
        off = np.abs(np.asarray(gradients[name]) - of_whole[name]) / np.abs(of_whole[name]).max()
        assert np.median(off) < 1e-3
        if kind == AxisType.Explicit:
            assert gradients[name].sharding.spec == spec
