"""Activation quantizers: codes, ranges and gradients against NumPy and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.activations import ActivationQuantizer
from ab_jax.products.ranges import InPass

ALL_BITS = range(2, 9)
BACKWARD = ("clipped", "blended")


def reference(x: np.ndarray, limit: float, bits: int, signed: bool) -> tuple[np.ndarray, float]:
    """Codes and scale in float64, by searching the nearest of all levels."""
    highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    codes = np.arange(-highest if signed else 0, highest + 1)
    scale = limit / highest
    nearest = np.abs(x.astype(np.float64)[..., None] - codes * scale).argmin(-1)
    return codes[nearest], scale


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_codes_are_the_nearest_levels(rng, bits, signed):
    limit = float(rng.uniform(0.1, 10))
    x = rng.normal(0, limit, 1000).astype(np.float32)
    quantizer = ActivationQuantizer(bits=bits, signed=signed)
    expected, scale = reference(x, limit, bits, signed)
    # A number half-way between two levels may fall on either side in float32.
    position = x.astype(np.float64) / scale
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-4
    codes = quantizer.codes(jnp.asarray(x), limit)
    assert codes.dtype == (jnp.int8 if signed else jnp.uint8)
    np.testing.assert_array_equal(np.asarray(codes, int)[clear], expected[clear])
    assert (int(codes.min()), int(codes.max())) == quantizer.levels
    np.testing.assert_array_equal(codes, jax.jit(quantizer.codes)(x, limit))
    values = quantizer(jnp.asarray(x), limit, 1.0)
    np.testing.assert_array_equal(values, codes.astype(jnp.float32) * quantizer.scale(limit))
    np.testing.assert_allclose(np.asarray(values)[clear], (expected * scale)[clear], rtol=1e-6)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_alpha_leads_from_the_activation_to_its_codes(rng, backward, dtype):
    quantizer = ActivationQuantizer(bits=4, backward=backward, signed=False)
    x = rng.normal(size=200)
    x[:3] = np.asarray([3, -0.0, -5]) * float(jnp.finfo(dtype).smallest_subnormal)
    x = jnp.asarray(x.astype(dtype))
    both = [jax.jit(quantizer)(x, jnp.float32(1.5), jnp.float32(alpha)) for alpha in (0, 0.25, 1)]
    assert all(y.dtype == dtype for y in both)
    assert np.asarray(both[0]).tobytes() == np.asarray(x).tobytes()
    np.testing.assert_array_equal(both[2], quantizer(x, 1.5, 1.0))
    if dtype == jnp.float32:
        expected = 0.75 * np.asarray(x) + 0.25 * np.asarray(both[2])
        np.testing.assert_allclose(both[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("signed", [False, True])
def test_the_gradient_of_each_rule(rng, alpha, signed):
    limit = 1.5
    x = rng.normal(0, 1.5, 500).astype(np.float32)
    inside = (np.abs(x) <= limit) & (signed | (x >= 0))
    expected = {
        "clipped": np.where(inside, 1.0, 1 - alpha),
        "blended": np.full(x.shape, 1 - alpha),
    }
    for backward in BACKWARD:
        quantizer = ActivationQuantizer(bits=3, signed=signed, backward=backward)
        gradient = jax.grad(lambda x, q=quantizer: jnp.sum(q(x, limit, alpha)))(jnp.asarray(x))
        np.testing.assert_allclose(gradient, expected[backward], rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 10])
def test_the_blended_rule_dies_out_with_depth_and_the_clipped_one_does_not(rng, depth):
    """Inside the range the factor of a layer is 1 or 1 - alpha, and depth multiplies it."""
    alpha, limit = 0.5, 4.0
    x = jnp.asarray(rng.uniform(0.5, 3.5, 100), jnp.float32)
    for backward, factor in (("clipped", 1.0), ("blended", (1 - alpha) ** depth)):
        quantizer = ActivationQuantizer(bits=8, backward=backward, signed=False)

        def network(x, quantizer=quantizer):
            for _ in range(depth):
                x = quantizer(x, limit, alpha)
            return jnp.sum(x)

        np.testing.assert_allclose(jax.grad(network)(x), factor, rtol=1e-5)
    assert (1 - alpha) ** 10 < 1e-3


def test_no_gradient_reaches_the_range(rng):
    x = jnp.asarray(rng.normal(size=50), jnp.float32)
    for backward in BACKWARD:
        quantizer = ActivationQuantizer(bits=4, signed=True, backward=backward)
        assert jax.grad(lambda limit, q=quantizer: jnp.sum(q(x, limit, 0.5)))(1.0) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_range_that_was_never_measured_leaves_the_activation_alone(rng, alpha):
    x = jnp.asarray(rng.normal(size=50), jnp.float32)
    for backward in BACKWARD:
        quantizer = ActivationQuantizer(bits=4, backward=backward, signed=False)
        y, pullback = jax.vjp(lambda x, q=quantizer: q(x, 0.0, alpha), x)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(pullback(jnp.ones_like(x))[0], 1)


def test_the_maximum_is_that_of_all_magnitudes(rng):
    x = rng.normal(size=(4, 5, 6)).astype(np.float32)
    measured = ActivationQuantizer(bits=8, signed=True).measure(jnp.asarray(x))
    assert measured == np.abs(x).max()


@pytest.mark.parametrize("percentile", [10.0, 50.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("outlier", [None, 1e4, 1e15])
@pytest.mark.parametrize("count", [1, 2, 500, 3000])
def test_the_percentile_is_that_of_each_image(rng, percentile, outlier, count):
    images = (rng.normal(size=(6, count)) * rng.uniform(0.1, 10, (6, 1))).astype(np.float32)
    if outlier is not None:
        images[:, 0] *= np.float32(outlier)
    exact = np.percentile(np.abs(images.astype(np.float64)), percentile, axis=1)
    quantizer = ActivationQuantizer(bits=8, percentile=percentile, signed=False)
    found = [quantizer.measure(jnp.asarray(image[None])) for image in images]
    np.testing.assert_allclose(found, exact, rtol=0.01)
    np.testing.assert_allclose(quantizer.measure(jnp.asarray(images)), np.mean(found), rtol=1e-5)


def test_the_percentile_of_images_with_zeros(rng):
    """After ReLU half of an image may be zeros, and all of one."""
    images = np.maximum(rng.normal(size=(4, 1000)), 0).astype(np.float32)
    images[3] = 0
    for percentile in (20.0, 50.0, 99.0):
        exact = np.percentile(images, percentile, axis=1)
        found = ActivationQuantizer(bits=4, percentile=percentile, signed=False).measure(
            jnp.asarray(images)
        )
        np.testing.assert_allclose(found, exact.mean(), rtol=0.01)


@pytest.mark.parametrize("percentile", [None, 99.0])
@pytest.mark.parametrize("count", [2, 8])
def test_devices_measure_what_one_device_would(rng, devices, percentile, count):
    quantizer = ActivationQuantizer(bits=8, percentile=percentile, signed=False)
    x = rng.normal(size=(16, 30)).astype(np.float32)
    shares = x.reshape(count, -1, 30)
    one = quantizer.measure(jnp.asarray(x))
    all_of_them = jax.pmap(
        lambda x: quantizer.measure(x, "devices"), axis_name="devices", devices=devices[:count]
    )(shares)
    np.testing.assert_allclose(all_of_them, np.full(count, one), rtol=1e-6)
    if percentile is None:
        np.testing.assert_array_equal(all_of_them, np.full(count, one))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"bits": 4.5}, "bits must be 2 to 8"),
        ({"bits": True}, "bits must be 2 to 8"),
        ({"bits": 4, "limit": 0.0}, "limit must be positive"),
        ({"bits": 4, "limit": float("nan")}, "limit must be positive"),
        ({"bits": 4, "percentile": 0.0}, "percentile must lie in"),
        ({"bits": 4, "percentile": 101.0}, "percentile must lie in"),
        ({"bits": 4, "limit": 6.0, "percentile": 99.0}, "fixed limit leaves no percentile"),
        ({"bits": 4, "momentum": 1.0}, "momentum must lie in"),
        ({"bits": 4, "backward": "ste"}, "'clipped' or 'blended'"),
    ],
)
def test_quantizers_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ActivationQuantizer(**arguments)


def test_a_quantizer_is_hashable_by_value():
    quantizer = ActivationQuantizer(bits=4, signed=False)
    assert hash(quantizer) == hash(ActivationQuantizer(bits=4, signed=False))
    assert quantizer != dataclasses.replace(quantizer, bits=5)


@pytest.mark.parametrize(
    "quantizer",
    [
        ActivationQuantizer(bits=8),
        ActivationQuantizer(bits=4, signed=False),
        ActivationQuantizer(bits=4, backward="blended"),
    ],
    ids=["signed", "unsigned", "blended"],
)
def test_is_traced_as_few_primitives(quantizer):
    """Each new shape is traced anew, and functions of `jax.numpy` take a trace of their own."""
    x, scalar = jnp.ones((2, 3), jnp.bfloat16), jnp.float32(0.5)
    state = InPass.of(scalar, scalar)
    steps = [
        (lambda x, limit, alpha: quantizer(x, limit, alpha), (x, scalar, scalar), 40),
        (quantizer.measure, (x,), 5),
        (lambda state, x: state.after(x, 0.9, (x, x)), (state, scalar), 24),
    ]
    for step, operands, most in steps:
        for equation in jax.make_jaxpr(step)(*operands).eqns:
            if equation.primitive.name in ("jit", "pjit"):
                inside = [e.primitive.name for e in equation.params["jaxpr"].eqns]
                assert len(inside) <= most
                assert not {"jit", "pjit"}.intersection(inside)
