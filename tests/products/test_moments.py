"""Second moments: a change of the weights by d costs the sum of d.T @ H @ d, in every product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

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


def split(mesh, body, in_specs, out_specs, check_vma=True):
    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )
    return lambda p, x: sharded(p["w"], x)


# What each device computes, and how the weight, the data and the result lie.
SPLIT = {
    "rows": (lambda w, x: x @ w, (P(), P("d")), P("d")),
    "outputs": (lambda w, x: x @ w, (P(None, "d"), P()), P(None, "d")),
    "a weight that is gathered": (
        lambda w, x: x @ jax.lax.all_gather(w, "d", tiled=True),
        (P("d"), P("d")),
        P("d"),
    ),
    "data that are gathered": (
        lambda w, x: jax.lax.all_gather(x, "d", tiled=True) @ w,
        (P(None, "d"), P("d")),
        P(None, "d"),
    ),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("how", SPLIT)
def test_over_devices_each_row_counts_once(rng, devices, how, check_vma):
    mesh = jax.make_mesh((4,), ("d",), devices=devices[:4], axis_types=(AxisType.Auto,))
    p, x = {"w": jnp.ones((8, 4))}, rng.normal(size=(4, 8)).astype(np.float32)
    found = second_moments(split(mesh, *SPLIT[how], check_vma=check_vma), p, [(x,)])
    np.testing.assert_allclose(found["w"], x.T @ x, rtol=1e-4, atol=1e-5)


def swapped(p, x):
    return jax.lax.conv_general_dilated(
        p["w"], x.reshape(2, 2, 2, 4), (1, 1), "VALID", dimension_numbers=NUMBERS
    )


def batch_groups(p, x):
    return jax.lax.conv_general_dilated(
        x.reshape(2, 2, 2, 4),
        p["w"],
        (1, 1),
        "VALID",
        dimension_numbers=NUMBERS,
        batch_group_count=2,
    )


def test_products_without_such_moments_are_refused_by_name(rng, devices):
    mesh = jax.make_mesh((4,), ("d",), devices=devices[:4], axis_types=(AxisType.Auto,))
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    in_parts = split(mesh, lambda w, x: jax.lax.psum(x @ w, "d"), (P("d"), P(None, "d")), P())
    a_layer_each = split(mesh, lambda w, x: x @ w[0], (P("d"), P("d")), P("d"))
    maybe = split(
        mesh,
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x),
        (P(), P("d")),
        P("d"),
    )
    for f, shape, why in (
        (in_parts, (8, 3), r"along \['d'\] has its own part .* summed over in parts"),
        (a_layer_each, (4, 8, 3), r"along \['d'\] has its own part .* another layer on each"),
        (maybe, (8, 8), r"devices along \['d'\] may leave it out alone"),
        (swapped, (2, 5, 5, 2), "its data are the kernel of the convolution"),
        (batch_groups, (1, 1, 4, 2), "its batch is split into groups"),
    ):
        with pytest.raises(ValueError, match=rf"input of w .*{why}.*product.address != 'w'"):
            second_moments(f, {"w": jnp.ones(shape)}, [(x,)])
