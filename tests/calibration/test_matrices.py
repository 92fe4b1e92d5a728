"""Products as matrices: rows times weight are the outputs, whatever the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ab_jax.calibration.matrices import Form, Moments


def form_of(f, x, w):
    """Of the only product of a function of data and a weight."""
    (equation,) = (e for e in jax.make_jaxpr(f)(x, w).eqns if e.primitive.name != "transpose")
    data = 0 if equation.invars[0] is jax.make_jaxpr(f)(x, w).jaxpr.invars[0] else None
    shapes = [v.aval.shape for v in equation.invars]
    return Form(equation, shapes.index(x.shape) if data is None else data)


def dot(contracted, batch=((), ())):
    return lambda x, w: lax.dot_general(x, w, (contracted, batch), precision="highest")


def weight_first(contracted, batch=((), ())):
    return lambda x, w: lax.dot_general(w, x, (contracted, batch), precision="highest")


def conv(strides, padding, layout=("NHWC", "HWIO", "NHWC"), groups=1, dilation=(1, 1)):
    return lambda x, w: lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=layout,
        feature_group_count=groups,
        precision="highest",
    )


CASES = {
    "dense": (dot(((1,), (0,))), (5, 6), (6, 3)),
    "dense of sequences": (dot(((2,), (0,))), (2, 5, 6), (6, 3)),
    "transposed weight": (dot(((1,), (1,))), (5, 6), (3, 6)),
    "heads": (dot(((2, 3), (0, 1))), (2, 4, 2, 5), (2, 5, 7)),
    "weight of two outputs": (dot(((1,), (1,))), (5, 6), (2, 6, 3)),
    "weight first": (weight_first(((1,), (2,))), (2, 5, 6), (3, 6)),
    "batched": (dot(((2,), (1,)), ((0,), (0,))), (3, 5, 6), (3, 6, 2)),
    "batched, weight first": (weight_first(((1,), (2,)), ((0,), (0,))), (3, 5, 6), (3, 6, 2)),
    "convolution": (conv((1, 1), "SAME"), (2, 5, 6, 3), (3, 3, 3, 4)),
    "strided": (conv((2, 2), "SAME"), (2, 7, 6, 3), (3, 2, 3, 4)),
    "padded": (conv((1, 2), [(2, 0), (1, 1)]), (2, 5, 6, 3), (3, 3, 3, 4)),
    "dilated": (conv((1, 1), "VALID", dilation=(2, 1)), (2, 7, 6, 3), (3, 3, 3, 4)),
    "depthwise": (conv((1, 1), "SAME", groups=3), (2, 5, 6, 3), (3, 3, 1, 3)),
    "grouped": (conv((1, 1), "SAME", groups=2), (2, 5, 6, 4), (3, 3, 2, 6)),
    "channels first": (
        conv((1, 1), "SAME", ("NCHW", "OIHW", "NCHW"), groups=2),
        (2, 4, 5, 6),
        (6, 2, 3, 3),
    ),
    "pointwise": (conv((1, 1), "SAME"), (2, 5, 6, 3), (1, 1, 3, 4)),
    "sound": (conv((2,), "SAME", ("NHC", "HIO", "NHC"), dilation=(1,)), (2, 9, 3), (4, 3, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_times_weight_are_the_outputs(rng, name):
    f, of_data, of_weight = CASES[name]
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (of_data, of_weight))
    form = form_of(f, x, w)
    assert form.why_not() is None
    y = f(x, w)
    rows, matrix, outputs = form.rows(x), form.of_weight(np.asarray(w)), form.outputs(y)
    wanted = np.einsum("grn,gnm->grm", rows, matrix)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-4, atol=1e-5)
    # Gains of channels are those of the columns of the weight.
    gains = jnp.asarray(rng.uniform(0.5, 2, (matrix.shape[0], matrix.shape[2])), jnp.float32)
    scaled = form.outputs(form.scaled(y, gains))
    np.testing.assert_allclose(scaled, outputs * gains[:, None], rtol=1e-5)


def test_of_large_images_every_few_positions_count(rng):
    x = jnp.asarray(rng.normal(size=(2, 56, 30, 3)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)
    f = conv((1, 1), "SAME")
    form = form_of(f, x, w)
    wanted = f(x, w)[:, ::4, ::2].reshape(-1, 4)
    found = np.einsum("grn,gnm->grm", form.rows(x), form.of_weight(np.asarray(w)))[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("about_mean", [False, True])
def test_moments_of_parts_are_those_of_the_whole(rng, about_mean):
    """Of inputs whose means are far above their deviations, too."""
    offset = rng.normal(size=(2, 1, 4)) * 100
    whole = rng.normal(size=(2, 2, 30, 4)) + offset
    parts = [
        tuple(jnp.asarray(x, jnp.float32) for x in whole[:, :, start:end])
        for start, end in ((0, 7), (7, 30))
    ]
    found = Moments.of_folds([parts], about_mean=about_mean)[0]
    own, plain = whole - whole.mean(2, keepdims=True) * about_mean
    assert found.count == 30
    np.testing.assert_allclose(found.own, own.swapaxes(1, 2) @ own / 30, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.cross, own.swapaxes(1, 2) @ plain / 30, rtol=1e-3, atol=1e-3)


def test_products_without_rows_say_why(rng):
    x, w = jnp.ones((4, 5, 6, 3)), jnp.ones((3, 3, 3, 4))
    f = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), batch_group_count=2
    )
    assert "batch is split" in form_of(f, x, w).why_not()
