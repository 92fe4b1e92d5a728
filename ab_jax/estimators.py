"""Estimators: what the loss sees in place of a weight, and the gradient that reaches the weight.

An estimator is a function `(w, quantizer, alpha) -> w_eff`, with `w_eff` of the shape and dtype of
`w`. They differ in two things: how far the forward pass has moved towards `Q(w)` at a given alpha,
and by what factor the gradient passes back:

    full_precision          w                                  factor 1
    straight_through        Q(w)                               factor 1
    soft_straight_through   (1 - alpha) * w + alpha * Q(w)     factor 1
    alpha_blend             (1 - alpha) * w + alpha * Q(w)     factor 1 - alpha, the true gradient

One that trains the scales too has them as a fourth argument, `scale`: `learned_step_size` of
`ab_jax.learned_scales`.

To add one, write such a function: `ab_jax.blend` takes it as it is. `quantizer.quantize(w)` gives
the codes and their values; `replace_value` keeps a gradient while it sets the value.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ab_jax.quantizers import Quantizer


class Estimator(Protocol):
    """What the loss sees of a weight: `(w, quantizer, alpha) -> w_eff`."""

    def __call__(self, w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
        """The array that stands for `w` in the loss."""


class ScaledEstimator(Protocol):
    """The same with scales that are trained: `(w, quantizer, alpha, scale) -> w_eff`."""

    def __call__(self, w: Array, quantizer: Quantizer, alpha: ArrayLike, scale: Array) -> Array:
        """The array that stands for `w` in the loss; gradients reach `w` and `scale`."""


def takes_scale(estimator: Callable[..., Any]) -> bool:
    """Whether an estimator has a parameter `scale`: it is a `ScaledEstimator`."""
    return "scale" in inspect.signature(estimator).parameters


def check_takes_scale(estimator: Callable[..., Any], given: bool) -> None:
    """Refuse an estimator that needs scales without them, and one that takes none with them.

    Raises:
      ValueError: it is so.
    """
    name = getattr(estimator, "__name__", repr(estimator))
    if takes_scale(estimator) and not given:
        raise ValueError(
            f"The estimator {name} needs the scales that are trained. Make them once by "
            f"ab_jax.initial_scales(params, rules), and give them as scales=."
        )
    if given and not takes_scale(estimator):
        raise ValueError(
            f"The estimator {name} takes no scales. Omit scales=, or train them by "
            f"estimator=ab_jax.learned_step_size."
        )


def full_precision(w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
    """The weight itself: training in floating point."""
    return w


def straight_through(w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
    """`Q(w)` whatever alpha is, with the gradient of `w`: the STE (arXiv 1308.3432)."""
    return replace_value(w, quantized_value(w, quantizer))


def soft_straight_through(w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
    """AB's value with the gradient of `w`: the form of BinaryRelax (arXiv 1801.06313)."""
    return replace_value(w, blended_value(w, quantized_value(w, quantizer), alpha))


def alpha_blend(w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
    """`(1 - alpha) * w + alpha * stop_gradient(Q(w))` with its own gradient (arXiv 1903.01061)."""
    return blended_value(w, quantized_value(w, quantizer), alpha)


def quantized_value(w: Array, quantizer: Quantizer) -> Array:
    """`Q(w)`: the value of the codes of `w`, without a gradient."""
    return quantizer.quantize(jax.lax.stop_gradient(w)).dequantize()


def blended_value(w: Array, q: Array, alpha: ArrayLike) -> Array:
    """`(1 - alpha) * w + alpha * q` in the dtype of `w`: `w` at alpha 0, `q` at 1, bit for bit.

    The arithmetic alone would not give the two ends: -0.0, subnormal and infinite weights do not
    survive it.
    """
    dtype = jnp.float64 if w.dtype == jnp.float64 else jnp.float32
    alpha = jnp.asarray(alpha, dtype)
    mixed = ((1 - alpha) * w.astype(dtype) + alpha * q.astype(dtype)).astype(w.dtype)
    return jnp.where(alpha == 0, w, jnp.where(alpha == 1, q, mixed))


@jax.custom_jvp
def replace_value(w: Array, value: Array) -> Array:
    """`value`, with the gradient of `w`.

    The usual `w + stop_gradient(value - w)` would round, and lose the exact value.
    """
    return value


@replace_value.defjvp
def _replace_value_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # Once more through `replace_value`, so that second derivatives see the gradient of `w` too.
    return replace_value(*primals), tangents[0]
