"""Estimators: what the loss sees in place of a weight, and the gradient that reaches the weight.

An estimator is a function `(w, quantizer, alpha) -> w_eff`, with `w_eff` of the shape and dtype of
`w`. They differ in two things: how far the forward pass has moved towards `Q(w)` at a given alpha,
and by what factor the gradient passes back:

    full_precision           w                                factor 1
    straight_through         Q(w)                             factor 1
    soft_straight_through    (1 - alpha) * w + alpha * Q(w)   factor 1
    alpha_blend              (1 - alpha) * w + alpha * Q(w)   factor 1 - alpha, the true gradient
    compensated_alpha_blend  (1 - alpha) * w + alpha * Q(w)   factor min(1, cap * (1 - alpha))
    alpha_blend_then_straight_through
                             (1 - alpha) * w + alpha * Q(w)   factor 1 - alpha; 1 at alpha 1
    parq                     w drawn to the levels beside it  factor 1

One that trains the scales too has them as a fourth argument, `scale`: `learned_step_size` of
`ab_jax.learned_scales`.

To add one, write such a function: `ab_jax.blend` takes it as it is. `quantizer.quantize(w)` gives
the codes and their values; `replace_value` keeps a gradient while it sets the value.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ab_jax.quantizers import Quantizer
from ab_jax.scale_fits import compute_dtype


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


def compensated_alpha_blend(
    w: Array, quantizer: Quantizer, alpha: ArrayLike, *, cap: float = 8.0
) -> Array:
    """AB's value with its gradient made up for the factor `1 - alpha`, up to `cap` times.

    The gradient that reaches `w` has the factor `min(1, cap * (1 - alpha))`: that of STE until
    alpha is `1 - 1 / cap`, then `cap` times AB's. (Our choice; the paper's abstract has no such
    thing.) Under SGD that is a learning rate `min(1 / (1 - alpha), cap)` times as large for the
    weights that are quantized, but for two things: weight decay is not enlarged, and momentum
    remembers gradients as they were enlarged then. Under Adam, which divides by the gradient's own
    size, it changes little.

    Args:
      cap: the most that a gradient is enlarged; 1 is `alpha_blend`. To choose another one:
        `functools.partial(compensated_alpha_blend, cap=4.0)`.

    Raises:
      ValueError: a cap that is below 1 or not finite.
    """
    if not 1 <= cap < math.inf:
        raise ValueError(
            f"compensated_alpha_blend takes a finite cap of at least 1, not cap={cap!r}: the most "
            f"that a gradient is enlarged."
        )
    value = blended_value(w, quantized_value(w, quantizer), alpha)
    return replace_value(_scaled(w, jnp.minimum(1, cap * _remainder(w, alpha))), value)


def alpha_blend_then_straight_through(w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
    """AB while alpha is below 1, STE once it is 1: AB as the warm-up of STE.

    At alpha 1 codes may change again. Let the ramp end early, or there is no STE to speak of.
    """
    value = blended_value(w, quantized_value(w, quantizer), alpha)
    rest = _remainder(w, alpha)
    return replace_value(_scaled(w, jnp.where(rest == 0, 1, rest)), value)


def parq(w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
    """PARQ's piecewise-affine proximal map of `w`, with the gradient of `w` (arXiv 2503.15748).

    Between two neighbouring levels, around the middle `m` of the two, the value is
    `m + (w - m) / (1 - alpha)`, cut off at the levels: the middle of each interval is stretched and
    what is near a level falls onto it. The slope `1 / (1 - alpha)` rises from the identity to hard
    rounding; alpha is 1 less the inverse slope of the paper, whose annealing is
    `ab_jax.sigmoid_ramp`. Weights outside the levels are at the outermost one as soon as alpha is
    above 0, as in the authors' code (`ProxPARQ` of torchao).

    At alpha 0 it is `w`, at 1 `Q(w)`, bit for bit. The levels are those of the weights as they are
    now, where the authors' code renews them every ten steps.
    """
    dtype = compute_dtype(w.dtype)
    latent = jax.lax.stop_gradient(w)
    quantized = quantizer.quantize(latent)
    below, above = quantized.beside(latent)
    middle = below / 2 + above / 2
    alpha = jnp.asarray(alpha, dtype)
    inverse_slope = jnp.where(alpha == 1, 1, 1 - alpha)
    mapped = jnp.clip(middle + (latent.astype(dtype) - middle) / inverse_slope, below, above)
    value = select(alpha == 1, quantized.dequantize(), mapped.astype(w.dtype))
    return replace_value(w, select(alpha == 0, latent, value))


def quantized_value(w: Array, quantizer: Quantizer) -> Array:
    """`Q(w)`: the value of the codes of `w`, without a gradient."""
    return quantizer.quantize(jax.lax.stop_gradient(w)).dequantize()


def blended_value(w: Array, q: Array, alpha: ArrayLike) -> Array:
    """`(1 - alpha) * w + alpha * q` in the dtype of `w`: `w` at alpha 0, `q` at 1, bit for bit.

    The arithmetic alone would not give the two ends: -0.0, subnormal and infinite weights do not
    survive it.
    """
    dtype = compute_dtype(w.dtype)
    alpha = jnp.asarray(alpha, dtype)
    mixed = ((1 - alpha) * w.astype(dtype) + alpha * q.astype(dtype)).astype(w.dtype)
    # The gradient is that of the sum, at the two ends too.
    return replace_value(mixed, select(alpha == 0, w, select(alpha == 1, q, mixed)))


def select(condition: Array, one: Array, other: Array) -> Array:
    """`one` where the condition holds, else `other`, bit for bit and without a gradient.

    Args:
      condition: bool, a scalar or of the shape of the two.
      one, other: of one shape and one floating-point dtype.
    """
    # Compilers may widen half precision around a selection, and flush subnormal numbers as they
    # round back. They leave integers alone.
    bits = jnp.dtype(f"uint{jnp.finfo(one.dtype).bits}")

    def whole(x: Array) -> Array:
        return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), bits)

    # A scalar condition as it is: spread out, it would be read at each element.
    chosen = jax.lax.select(condition, whole(one), whole(other))
    return jax.lax.bitcast_convert_type(chosen, one.dtype)


def _remainder(w: Array, alpha: ArrayLike) -> Array:
    """`1 - alpha`, the gradient's factor in AB."""
    return 1 - jnp.asarray(alpha, compute_dtype(w.dtype))


def _scaled(w: Array, factor: Array) -> Array:
    """A stand-in for `w` through which gradients pass with this factor."""
    return (factor * w.astype(factor.dtype)).astype(w.dtype)


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
