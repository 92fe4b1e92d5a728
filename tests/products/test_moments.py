"""Second moments: a change of the weights by d costs the sum of d.T @ H @ d, in every product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.products import second_moments

NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolved(x, w, strides=(1, 1), groups=1):
    return jax.lax.conv_general_dilated(
        x, w, strides, "SAME", dimension_numbers=NUMBERS, feature_group_count=groups
    )


def cost(moment, change):
    """`change`: [..., n, outputs]"""
    return np.einsum("...io,...ij,...jo->...", change, moment, change)


def flat(w):
    """A convolution's weights as its moments have them: input channels, then the window."""
    return np.moveaxis(np.asarray(w), 2, 0).reshape(-1, w.shape[-1])


def test_what_a_change_of_weights_costs_is_told_by_the_moments(rng):
    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "conv": drawn(3, 3, 4, 6),
        "depthwise": drawn(3, 3, 1, 6),
        "dense": drawn(6, 5),
        "heads": drawn(5, 2, 3),
        "layers": drawn(3, 6, 6),
    }

    def f(p, x):
        a = convolved(x, p["conv"], (2, 2))
        b = convolved(a, p["depthwise"], groups=6)
        c = b.mean((1, 2)) @ p["dense"]
        d = jnp.einsum("bd,dnh->bnh", c, p["heads"])

        def layer(y, w):
            return jnp.tanh(y @ w), y @ w

        _, e = jax.lax.scan(layer, d.reshape(-1, 6), p["layers"])
        return {"conv": a, "depthwise": b, "dense": c, "heads": d, "layers": e}

    batches = [(drawn(2, 8, 8, 4),) for _ in range(2)]
    moments = second_moments(f, params, batches)
    outputs = [f(params, *inputs) for inputs in batches]
    squares = {
        name: sum(
            np.sum(
                np.square(np.asarray(y[name], np.float64)),
                tuple(range(1 if name == "layers" else 0, y[name].ndim)),
            )
            for y in outputs
        )
        for name in params
    }
    conv, depthwise = flat(params["conv"]), flat(params["depthwise"])
    np.testing.assert_allclose(cost(moments["conv"][0], conv), squares["conv"], rtol=1e-4)
    by_group = cost(moments["depthwise"], depthwise.T[:, :, None])
    np.testing.assert_allclose(by_group.sum(), squares["depthwise"], rtol=1e-4)
    np.testing.assert_allclose(cost(moments["dense"], params["dense"]), squares["dense"], rtol=1e-4)
    heads = np.asarray(params["heads"]).reshape(5, 6)
    np.testing.assert_allclose(cost(moments["heads"], heads), squares["heads"], rtol=1e-4)
    np.testing.assert_allclose(
        cost(moments["layers"], params["layers"]), squares["layers"], rtol=1e-4
    )
    assert moments["layers"].shape == (3, 6, 6)


def test_only_what_is_chosen_is_measured(rng):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    f = lambda p, x: (x @ p["a"]) @ p["b"]
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    found = second_moments(f, params, [(x,)], chosen=lambda product: product.weight == "a")
    assert found.keys() == {"a"}
    np.testing.assert_allclose(found["a"], x.T @ x, rtol=1e-5)
    with pytest.raises(ValueError, match="No product with a weight is chosen"):
        second_moments(f, params, [(x,)], chosen=lambda product: False)
    with pytest.raises(ValueError, match="no batch"):
        second_moments(f, params, [])
