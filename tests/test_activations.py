"""Activations: values at both ends of the ramp, and each backward rule against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.activations import ACTIVATIONS, relu, sign
from ab_jax.estimators import Estimator, alpha_blend, soft_straight_through, straight_through

ALPHAS = (0.0, 0.25, 0.5, 1.0)

# By what the gradient is multiplied, beside the derivative of the hard tanh.
FACTORS = {
    soft_straight_through: lambda alpha: 1.0,
    straight_through: lambda alpha: 1.0,
    alpha_blend: lambda alpha: 1.0 - alpha,
}


def some_inputs(rng: np.random.Generator) -> np.ndarray:
    """Both the linear and the flat part of the hard tanh, no point on its corners."""
    x = rng.uniform(-2, 2, (3, 50)).astype(np.float32)
    x[np.abs(np.abs(x) - 1) < 1e-3] = 0.5
    assert (np.abs(x) > 1).any()
    assert (np.abs(x) < 1).any()
    return x


def signs(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, np.float32(1), np.float32(-1))


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_sign_goes_from_the_hard_tanh_to_the_sign(rng: np.random.Generator, alpha: float) -> None:
    x = some_inputs(rng)
    alpha = np.float32(alpha)
    expected = (1 - alpha) * np.clip(x, -1, 1) + alpha * signs(x)
    for estimator in (soft_straight_through, alpha_blend):
        for function in (sign, jax.jit(sign, static_argnames="estimator")):
            y = function(x, alpha, estimator=estimator)
            assert y.dtype == np.float32
            np.testing.assert_allclose(y, expected, rtol=0, atol=2e-7)  # two roundings near 1
            if alpha in (0, 1):
                np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sign_with_the_straight_through_rule_is_the_sign_at_every_alpha(
    rng: np.random.Generator, alpha: float
) -> None:
    x = some_inputs(rng)
    np.testing.assert_array_equal(sign(x, alpha, estimator=straight_through), signs(x))


@pytest.mark.parametrize("estimator", FACTORS)
def test_zero_counts_as_plus_one(estimator: Estimator) -> None:
    x = jnp.asarray([0.0, -0.0, -1e-30, 1e-30])
    np.testing.assert_array_equal(sign(x, 1.0, estimator=estimator), [1, 1, -1, 1])


def test_large_and_infinite_inputs_stay_within_one() -> None:
    x = jnp.asarray([-jnp.inf, -1e30, 1e30, jnp.inf])
    for alpha in ALPHAS:
        np.testing.assert_array_equal(sign(x, alpha), [-1, -1, 1, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_shape_and_dtype(
    rng: np.random.Generator, name: str, dtype: jnp.dtype
) -> None:
    x = jnp.asarray(some_inputs(rng), dtype)
    y = ACTIVATIONS[name](x, 0.3)
    assert y.shape == x.shape
    assert y.dtype == dtype


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("estimator", FACTORS)
def test_gradient_of_sign_is_the_hard_tanhs_times_the_factor(
    rng: np.random.Generator, estimator: Estimator, alpha: float
) -> None:
    x = some_inputs(rng)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    _, pull = jax.vjp(lambda x: sign(x, alpha, estimator=estimator), x)
    expected = cotangent * (np.abs(x) < 1) * np.float32(FACTORS[estimator](alpha))
    np.testing.assert_allclose(pull(cotangent)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
@pytest.mark.parametrize("estimator", FACTORS)
def test_gradient_through_ten_layers_carries_the_factor_ten_times(
    rng: np.random.Generator, estimator: Estimator, alpha: float
) -> None:
    depth = 10
    slopes = rng.uniform(0.3, 0.9, depth)  # keep what enters each layer inside (-1, 1)

    def chain(x: jax.Array) -> jax.Array:
        for slope in slopes:
            x = sign(slope * x, alpha, estimator=estimator)
        return x

    # A negative input too: the blend with its sign must not leave the linear part.
    for x in (0.4, -0.7):
        expected = np.prod(slopes) * FACTORS[estimator](alpha) ** depth
        np.testing.assert_allclose(jax.grad(chain)(x), expected, rtol=1e-5)


def test_named_signs_differ_in_their_backward_rule() -> None:
    def slope(name: str) -> float:
        return float(jax.grad(lambda x: ACTIVATIONS[name](x, 0.75))(0.5))

    assert slope("relu") == 1
    assert slope("sign") == 1
    assert slope("sign_blend") == 0.25


def test_relu_ignores_alpha(rng: np.random.Generator) -> None:
    x = some_inputs(rng)
    for alpha in ALPHAS:
        np.testing.assert_array_equal(relu(x, alpha), np.maximum(x, 0))


def test_named_activations_compile_once_for_all_alphas(rng: np.random.Generator) -> None:
    x = some_inputs(rng)
    for activation in ACTIVATIONS.values():
        traces = 0

        def counted(x: jax.Array, alpha: jax.Array, activation=activation) -> jax.Array:
            nonlocal traces
            traces += 1
            return activation(x, alpha)

        compiled = jax.jit(counted)
        for alpha in ALPHAS:
            # Two programs may round the blend differently; the ends are exact (above).
            np.testing.assert_allclose(
                compiled(x, jnp.float32(alpha)), activation(x, alpha), rtol=0, atol=2e-7
            )
        assert traces == 1
