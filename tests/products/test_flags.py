"""Python's bools and strings among the inputs of a function."""

import jax.numpy as jnp
import numpy as np

from ab_jax.activations import ActivationQuantizer
from ab_jax.products import (
    ActivationRules,
    find_products,
    intercept,
    measure_ranges,
    second_moments,
)


def test_flags_among_the_inputs_reach_the_function_as_they_are(rng):
    p = {"w": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def f(p, batch, twice, kind):
        y = batch["x"] @ p["w"] if kind == "product" else batch["x"]
        return y @ p["w"] if twice and not batch["once"] else y

    def addresses(*inputs):
        return [product.address for product in find_products(f, p, *inputs)]

    batch = {"x": x, "once": False}
    assert addresses(batch, True, "product") == ["w", "w#1"]
    assert addresses(batch, False, "product") == ["w"]
    assert addresses({"x": x, "once": True}, True, "none") == []
    doubled = intercept(f, lambda product, side, x, state: (2 * x, state))
    found, _ = doubled({}, p, batch, True, "product")
    np.testing.assert_allclose(found, 4 * f(p, batch, True, "product"), rtol=1e-5)


def test_batches_may_hold_flags(rng):
    def f(p, x, kind):
        hidden = jnp.tanh(x @ p["first"])
        return hidden @ p["second"] if kind == "deep" else hidden

    shapes = {"first": (6, 8), "second": (8, 3)}
    p = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    batches = [(rng.normal(size=(4, 6)).astype(np.float32) * k, "deep") for k in (1, 3)]
    rules = ActivationRules([(".*", ActivationQuantizer(bits=8))])
    found = measure_ranges(f, rules, p, batches)
    largest = max(np.abs(x).max() for x, _ in batches)
    np.testing.assert_allclose(found["first"].limit, largest)
    assert found.keys() == {"first", "second"}
    moments = second_moments(f, p, batches)
    wanted = sum(x.T @ x for x, _ in batches)
    np.testing.assert_allclose(moments["first"], wanted, rtol=1e-4, atol=1e-4)
