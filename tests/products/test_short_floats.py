"""Inputs of 8-bit floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.products import ActivationRules, initial_ranges, quantize_inputs


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda t: t.__name__)
@pytest.mark.parametrize(
    "quantizer",
    [
        ActivationQuantizer(bits=4),
        ActivationQuantizer(bits=4, signed=False, percentile=90.0),
        ActivationQuantizer(bits=4, limit=1.5, backward="blended"),
        TokenQuantizer(bits=4),
    ],
    ids=str,
)
def test_eight_bit_floats_are_quantized_as_longer_ones(rng, dtype, quantizer):
    x = jnp.asarray(np.abs(rng.normal(size=(5, 6))), dtype)
    p = {"w": jnp.asarray(rng.normal(size=(6, 3)), dtype)}
    rules = ActivationRules([(".*", quantizer)])

    def f(p, x):
        return jax.lax.dot(x, p["w"], preferred_element_type=jnp.float32)

    start = initial_ranges(f, rules, p, x)
    y, ranges = quantize_inputs(f, rules)(p, x, ranges=start, measure=True)
    longer = x.astype(jnp.float32)
    if isinstance(quantizer, TokenQuantizer):
        values = quantizer(longer, (1,), 1.0)
    else:
        limit = quantizer.limit or quantizer.measure(longer)
        np.testing.assert_allclose(ranges["w"].limit, limit)
        values = quantizer(longer, limit, 1.0)
    np.testing.assert_allclose(y, f(p, values.astype(dtype)), rtol=1e-5)
    at_0, _ = quantize_inputs(f, rules)(p, x, ranges=ranges, alpha=0.0)
    np.testing.assert_array_equal(at_0, f(p, x))
