"""Estimators: exact values at both ends of the ramp, and the factor on the gradient."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax import (
    Binary,
    Ternary,
    Uniform,
    alpha_blend,
    alpha_blend_then_straight_through,
    compensated_alpha_blend,
    full_precision,
    parq,
    replace_value,
    soft_straight_through,
    straight_through,
)
from ab_jax.estimators import blended_value, computed_once

# By the factor on the gradient, at an alpha in float32.
FACTORS = {
    full_precision: lambda alpha: 1,
    straight_through: lambda alpha: 1,
    soft_straight_through: lambda alpha: 1,
    alpha_blend: lambda alpha: 1 - alpha,
    compensated_alpha_blend: lambda alpha: min(1, 8 * (1 - alpha)),
    alpha_blend_then_straight_through: lambda alpha: 1 if alpha == 1 else 1 - alpha,
}
ESTIMATORS = list(FACTORS)
BLENDS = [
    soft_straight_through,
    alpha_blend,
    compensated_alpha_blend,
    alpha_blend_then_straight_through,
]
QUANTIZERS = [
    Binary(),
    Ternary(axis=None),
    Uniform(bits=3, symmetric=False, scale="absmax"),
]
DTYPES = ["float32", "bfloat16", "float16"]
SHAPE = (8, 6)

each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)


def assert_same_bits(found, wanted) -> None:
    """Equal as integers: -0.0 is not 0.0 here."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.dtype == wanted.dtype
    as_integers = f"u{found.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(as_integers), wanted.view(as_integers), strict=True)


def weights_with_extremes(rng: np.random.Generator, dtype: str) -> jax.Array:
    """Normal weights, among them -0.0, subnormals, and 1e30 (float16: 6e4)."""
    w = rng.normal(size=SHAPE)
    huge = 6e4 if dtype == "float16" else 1e30
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    w[1] = -0.0
    w[2, :3] = [tiny, -tiny, 37 * tiny]
    w[3, 3:] = [huge, -huge, 0.0]
    array = np.asarray(w, jnp.dtype(dtype))
    assert np.signbit(array[1]).all()
    assert (array[2, :3] != 0).all()
    return jnp.asarray(array)


# How a caller may hand over alpha: in several forms, into a jitted function, or fixed within.
CALLERS = {
    "number": lambda f, w, alpha: f(w, alpha),
    "array": lambda f, w, alpha: f(w, jnp.float32(alpha)),
    "traced": lambda f, w, alpha: jax.jit(f)(w, alpha),
    "jitted": lambda f, w, alpha: jax.jit(lambda w: f(w, alpha))(w),
}
BOTH_ENDS = [
    *((alpha_blend, "float32", call) for call in CALLERS),
    *((alpha_blend, dtype, call) for dtype in DTYPES[1:] for call in ("number", "traced")),
    *(
        (other, dtype, "traced")
        for other in (*BLENDS, parq)
        for dtype in DTYPES
        if other is not alpha_blend
    ),
]


# Values


@pytest.mark.parametrize(("estimator", "dtype", "call"), BOTH_ENDS)
def test_alpha_0_is_the_weight_bit_for_bit(rng, estimator, dtype, call):
    w = np.array(weights_with_extremes(rng, dtype))
    w[4, 1], w[5, 2] = np.inf, -np.inf
    w = jnp.asarray(w)
    for quantizer in (Binary(), Uniform(bits=3, symmetric=False, scale="absmax")):
        found = CALLERS[call](lambda w, alpha, q=quantizer: estimator(w, q, alpha), w, 0.0)
        assert_same_bits(found, w)


@pytest.mark.parametrize(("estimator", "dtype", "call"), BOTH_ENDS)
def test_alpha_1_is_the_value_of_the_codes_bit_for_bit(rng, estimator, dtype, call):
    w = weights_with_extremes(rng, dtype)
    for quantizer in (Binary(), Uniform(bits=3, symmetric=False, scale="absmax")):
        found = CALLERS[call](lambda w, alpha, q=quantizer: estimator(w, q, alpha), w, 1.0)
        wanted = quantizer.quantize(w).dequantize()
        assert_same_bits(found, wanted)
        assert (np.asarray(found) != np.asarray(w)).any()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("estimator", [*BLENDS, parq], ids=lambda f: f.__name__)
def test_alpha_0_keeps_every_odd_number_of_16_bits(estimator, dtype):
    """All subnormal numbers, zeros, infinities and NaNs, in the shape that the others have."""
    exponent = ((1 << jnp.finfo(dtype).nexp) - 1) << jnp.finfo(dtype).nmant
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isin(bits & exponent, (0, exponent))]
    blend = jax.jit(lambda w, alpha: estimator(w, Binary(fixed_scale=1.0), alpha))
    for chunk in np.resize(bits, (-(-bits.size // math.prod(SHAPE)), *SHAPE)):
        found = blend(chunk.view(dtype), 0.0)
        np.testing.assert_array_equal(np.asarray(found).view(np.uint16), chunk)


def test_alpha_1_keeps_values_that_are_subnormal(rng):
    w = jnp.asarray(1e-6 * rng.normal(size=SHAPE), jnp.float16)
    quantizer = Uniform(bits=8, scale="absmax")
    wanted = quantizer.quantize(w).dequantize()
    assert ((wanted != 0) & (abs(wanted) < jnp.finfo("float16").tiny)).any()
    for estimator in (*BLENDS, parq, straight_through):
        found = jax.jit(lambda w, a, f=estimator: f(w, quantizer, a))(w, 1.0)
        assert_same_bits(found, wanted)


@each_dtype
def test_alpha_1_is_exact_for_infinite_weights_too(dtype):
    """Whose values may be finite, by a rule of one's own: the arithmetic would make them NaN."""
    w = jnp.asarray([[np.inf, 1.0], [-np.inf, -0.5]], dtype)
    q = jnp.asarray([[1, 1], [-1, -1]], dtype)
    assert_same_bits(blended_value(w, q, 1.0), q)


@pytest.mark.parametrize("estimator", [*BLENDS, parq, straight_through], ids=lambda f: f.__name__)
def test_alpha_1_shows_a_weight_that_is_no_finite_number_as_quantize_does(rng, estimator):
    for quantizer in (Binary(), Uniform(bits=4), Uniform(bits=4, symmetric=False)):
        w = rng.normal(size=(3, 8, 3)).astype(np.float32)
        w[[0, 1, 2], 5, 1] = np.nan, np.inf, -np.inf
        for one in w:
            rules = ab.Rules([("w", quantizer)])
            found = ab.blend({"w": one}, rules, 1.0, estimator=estimator)["w"]
            assert np.all(np.isnan(found) == [False, True, False])
            wanted = ab.dequantize(ab.quantize({"w": one}, rules))["w"]
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, Uniform(bits=4)], ids=repr)
def test_both_ends_for_every_quantizer(rng, quantizer):
    w = weights_with_extremes(rng, "float32")
    jitted = jax.jit(alpha_blend, static_argnums=1)
    quantized = quantizer.quantize(w).dequantize()
    for blend in (alpha_blend, jitted):
        assert_same_bits(blend(w, quantizer, 0.0), w)
        assert_same_bits(blend(w, quantizer, 1.0), quantized)
    for alpha in (0.0, 0.3, 1.0):
        assert_same_bits(full_precision(w, quantizer, alpha), w)
        assert_same_bits(straight_through(w, quantizer, alpha), quantized)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    w=hnp.arrays(
        np.float32,
        (4, 2),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True),
        fill=st.nothing(),
    ),
    traced=st.booleans(),
)
def test_both_ends_for_any_weights(w, traced):
    blend = jitted_alpha_blend if traced else alpha_blend
    assert_same_bits(blend(w, Binary(), np.float32(0)), w)
    assert_same_bits(blend(w, Binary(), np.float32(1)), Binary().quantize(w).dequantize())


jitted_alpha_blend = jax.jit(alpha_blend, static_argnums=1)


@each_dtype
def test_between_the_ends_the_value_is_the_blend(rng, dtype):
    w = jnp.asarray(rng.normal(size=SHAPE), dtype)
    quantizer = Uniform(bits=3, symmetric=False, scale="absmax")
    q = np.asarray(quantizer.quantize(w).dequantize(), np.float64)
    tolerance = float(jnp.finfo(dtype).eps)
    for alpha in rng.uniform(size=4):
        wanted = (1 - alpha) * np.asarray(w, np.float64) + alpha * q
        found = alpha_blend(w, quantizer, alpha)
        assert found.dtype == w.dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float64), wanted, rtol=tolerance, atol=tolerance
        )
        for estimator in BLENDS:
            assert_same_bits(estimator(w, quantizer, alpha), found)


def test_alpha_blend_is_what_qkeras_does_without_ste(rng):
    """`quantized_bits(4, 0, symmetric=1, alpha=1.0, use_ste=False)` at a `qnoise_factor`.

    Its formula in float64: x + factor * (xq - x), of which x has the gradient 1 - factor and xq
    none. Weights that reach to 7/8 have its grid under `absmax`.
    """
    x = rng.uniform(-0.875, 0.875, size=SHAPE)
    x[0, 0] = 0.875
    x = x.astype(np.float32)
    xq = np.clip(np.round(x.astype(np.float64) * 8) / 8, -1 + 1 / 8, 1 - 1 / 8)
    quantizer = Uniform(bits=4, scale="absmax", axis=None)
    for qnoise_factor in (0.0, 0.25, rng.uniform(), 1.0):
        found, pull_back = jax.vjp(
            lambda w, f=qnoise_factor: alpha_blend(w, quantizer, f), jnp.asarray(x)
        )
        np.testing.assert_allclose(found, x + qnoise_factor * (-x + xq), rtol=0, atol=1e-6)
        (gradient,) = pull_back(jnp.ones(SHAPE, jnp.float32))
        np.testing.assert_allclose(gradient, 1 - qnoise_factor, rtol=1e-6)


def test_float64_keeps_its_digits(rng):
    with jax.enable_x64(True):
        w = jnp.asarray(rng.normal(size=SHAPE))
        assert w.dtype == jnp.float64
        q = Binary().quantize(w).dequantize()
        assert q.dtype == jnp.float64
        for alpha in (0.0, 1 / 3, 1.0):
            found = alpha_blend(w, Binary(), alpha)
            np.testing.assert_allclose(found, (1 - alpha) * w + alpha * q, rtol=1e-15)
            np.testing.assert_array_equal(
                jax.grad(lambda w, a=alpha: alpha_blend(w, Binary(), a).sum())(w), 1 - alpha
            )
        assert_same_bits(alpha_blend(w, Binary(), 0.0), w)
        assert_same_bits(alpha_blend(w, Binary(), 1.0), q)


# Gradients


def loss(w_eff: jax.Array) -> jax.Array:
    """Not linear, and different for each weight."""
    coefficients = jnp.arange(1.0, 1 + w_eff.size).reshape(w_eff.shape) / w_eff.size
    return jnp.sum(jnp.sin(3 * w_eff.astype(jnp.float32)) * coefficients)


def factor(estimator, alpha: np.float32) -> np.float32:
    """What the gradient with respect to the blended weight is multiplied by on its way."""
    return np.float32(FACTORS[estimator](np.float32(alpha)))


@each_estimator
@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [*((quantizer, "float32") for quantizer in QUANTIZERS), *((Binary(), d) for d in DTYPES[1:])],
    ids=repr,
)
def test_the_gradient_is_the_plain_one_times_the_factor(rng, estimator, quantizer, dtype):
    w = jnp.asarray(rng.normal(size=SHAPE), dtype)
    for alpha in (np.float32(0), np.float32(1), *rng.uniform(size=3).astype(np.float32)):
        w_eff, pull_back = jax.vjp(lambda w, a=alpha: estimator(w, quantizer, a), w)
        plain = jax.grad(loss)(w_eff)
        (found,) = pull_back(plain)
        exact = np.asarray(plain, np.float32) * factor(estimator, alpha)
        wanted = exact.astype(plain.dtype)
        assert (wanted != 0).any() or factor(estimator, alpha) == 0
        np.testing.assert_array_equal(np.asarray(found), wanted, strict=True)
        # The same through the loss at once.
        whole = jax.grad(lambda w, a: loss(estimator(w, quantizer, a)))
        np.testing.assert_array_equal(np.asarray(whole(w, alpha)), wanted, strict=True)


@each_estimator
def test_the_compiled_gradient_too(rng, estimator):
    w = rng.normal(size=SHAPE).astype(np.float32)
    quantizer = Uniform(bits=4, scale="absmax")
    value_and_grad = jax.jit(jax.value_and_grad(lambda w, a: loss(estimator(w, quantizer, a))))
    for alpha in (np.float32(0), np.float32(1), *rng.uniform(size=8).astype(np.float32)):
        w_eff = estimator(jnp.asarray(w), quantizer, alpha)
        value, found = value_and_grad(w, alpha)
        np.testing.assert_allclose(value, loss(w_eff), rtol=1e-5, atol=1e-5)
        wanted = factor(estimator, alpha) * np.asarray(jax.grad(loss)(w_eff))
        # Where the cosine is near 0, the last bit of an effective weight moves it by 1.1e-6 of the
        # largest gradient at most (150 draws).
        largest = float(np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6 * largest)
        if factor(estimator, alpha) == 0:
            np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("cap", [1.0, 2.5, 40.0])
def test_the_compensated_gradient_is_that_of_ste_until_the_cap(rng, cap):
    w = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    estimator = functools.partial(compensated_alpha_blend, cap=cap)
    turn = 1 - 1 / cap
    below, above = rng.uniform(0, turn), rng.uniform(turn, 1)
    for alpha, wanted in ((0, 1), (below, 1), (above, cap * (1 - above)), (1, 0)):
        found = jax.grad(lambda w, a=alpha: estimator(w, Binary(), a).sum())(w)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * cap)


def test_compensation_is_a_larger_rate_under_sgd_with_momentum(rng):
    """Three steps in float64 with other rates; at alpha 1 both rest."""
    w, direction = rng.normal(size=(2, *SHAPE))
    cap, rate, momentum = 4.0, 0.1, 0.9
    wanted, moved = w.copy(), 0.0
    found, trace = jnp.asarray(w, jnp.float32), 0.0
    for alpha in (0.2, 0.7, 0.95, 1.0):
        enlarged = 1.0 if alpha == 1 else min(1 / (1 - alpha), cap)
        moved = momentum * moved + enlarged * (1 - alpha) * direction
        wanted -= rate * moved
        gradient = jax.grad(
            lambda w, a=alpha: jnp.sum(
                compensated_alpha_blend(w, Binary(), a, cap=cap) * direction.astype("float32")
            )
        )(found)
        trace = momentum * trace + gradient
        found = found - rate * trace
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [0.99, 0, -3, math.inf, math.nan])
def test_a_cap_that_would_slow_down_or_never_ends_is_refused(cap):
    with pytest.raises(ValueError, match=r"finite cap of at least 1, not cap="):
        compensated_alpha_blend(jnp.ones(3), Binary(), 0.5, cap=cap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_slope_in_alpha_is_the_way_to_the_codes(rng, dtype):
    """Between the ends, where alpha may be trained."""
    w = jnp.asarray(rng.normal(size=SHAPE), dtype)
    way = np.asarray(Binary().quantize(w).dequantize(), np.float64) - np.asarray(w, np.float64)
    slope = jax.jacfwd(lambda a: alpha_blend(w, Binary(), a))(jnp.float32(0.3))
    np.testing.assert_allclose(
        np.asarray(slope, np.float64), way, rtol=1e-2, atol=4 * jnp.finfo(dtype).eps
    )


def test_alpha_blend_has_the_true_gradient_and_the_others_have_not(rng):
    """Finite differences, in float64, with codes that stay as they are over such a step."""
    with jax.enable_x64(True):
        w = jnp.asarray(rng.normal(size=SHAPE))
        w = w + 0.1 * jnp.sign(w)  # no sign changes under a small step
        quantizer = Binary(fixed_scale=1.0)  # no scale changes either
        direction = jnp.asarray(rng.normal(size=SHAPE))
        step = 1e-6

        def value(estimator, w):
            return jnp.sum(jnp.sin(3 * estimator(w, quantizer, 0.4)) ** 2)

        for estimator in (alpha_blend, soft_straight_through):
            slope = jax.jvp(lambda w, f=estimator: value(f, w), (w,), (direction,))[1]
            ahead, behind = (
                value(estimator, w + step * direction),
                value(estimator, w - step * direction),
            )
            agrees = np.isclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)
            assert agrees == (estimator is alpha_blend)


@each_estimator
def test_second_order(rng, estimator):
    """A Hessian-vector product: the factor acts once on the way in and once on the way out."""
    w = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    v = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    quantizer, alpha = Binary(), np.float32(0.3)

    def gradient(w):
        return jax.grad(lambda w: loss(estimator(w, quantizer, alpha)))(w)

    _, found = jax.jvp(gradient, (w,), (v,))
    w_eff = estimator(w, quantizer, alpha)
    _, plain = jax.jvp(jax.grad(loss), (w_eff,), (v,))
    np.testing.assert_allclose(found, factor(estimator, alpha) ** 2 * plain, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_lost_to_infinities_or_zeros():
    """A factor times infinity would be NaN: at both ends the other side has to stay out."""
    w = jnp.asarray([[jnp.inf, 1.0], [-0.0, 1e-40], [2.0, -3.0]])
    gradient = jax.grad(lambda w, a: alpha_blend(w, Binary(axis=None), a).sum())
    np.testing.assert_array_equal(gradient(w, 0.0), 1.0)
    np.testing.assert_array_equal(gradient(w, 1.0), 0.0)


def test_replace_value_sets_the_value_and_keeps_the_gradient(rng):
    # The usual w + stop_gradient(value - w) would lose values that are so much smaller.
    w, value = (jnp.asarray(rng.normal(size=SHAPE) * s, jnp.float32) for s in (1e8, 1e-8))
    assert (w + (value - w) != value).any()
    found, pull_back = jax.vjp(replace_value, w, value)
    assert_same_bits(found, value)
    for_w, for_value = pull_back(w + 1)
    assert_same_bits(for_w, w + 1)
    np.testing.assert_array_equal(for_value, 0.0)


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn"])
def test_computed_once_is_the_same_bits_with_the_same_gradient(dtype):
    bits = np.random.default_rng(0).integers(0, 256, (64, 32), np.uint8)
    w = jnp.asarray(bits.view(jnp.dtype(dtype)))  # NaN, infinities and subnormal numbers among them
    assert_same_bits(computed_once(w), w)
    assert_same_bits(jax.jit(jax.vmap(computed_once))(w), w)
    pulled_back = jax.vjp(computed_once, w)[1](w)[0]
    assert_same_bits(pulled_back, w)


@each_estimator
def test_vmap_over_models_and_alphas(rng, estimator):
    w = jnp.asarray(rng.normal(size=(3, *SHAPE)), jnp.float32)
    alphas = jnp.asarray([0.0, 0.3, 1.0])
    found = jax.vmap(lambda w, a: estimator(w, Binary(), a))(w, alphas)
    for i in range(3):
        np.testing.assert_allclose(found[i], estimator(w[i], Binary(), alphas[i]), rtol=1e-6)
