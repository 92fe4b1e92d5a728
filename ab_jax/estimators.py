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
the codes and their values; `replace_value` keeps a gradient while it sets the value. One that wants
no more than the codes of the weight itself is better written as a rule `(w, codes, alpha)` under
`from_codes`: then it can do with what was fitted at an earlier step.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ab_jax.quantized import Quantized
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
      ValueError: it is so. TypeError: it is no function.
    """
    if not callable(estimator):
        raise TypeError(
            f"estimator must be a function such as ab_jax.alpha_blend or ab_jax.straight_through, "
            f"not {estimator!r}."
        )
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


def from_codes(rule: Callable[..., Array]) -> Callable[..., Array]:
    """Make an estimator of a rule `(w, codes, alpha, **options) -> w_eff`.

    The codes are the `Quantized` of `w`, at what its quantizer fits or what `ab_jax.blend` got as
    `fits`.
    """

    @functools.wraps(rule)
    def estimator(w: Array, quantizer: Quantizer, alpha: ArrayLike, **options: Any) -> Array:
        return rule(w, quantizer.quantize(lax.stop_gradient(w)), alpha, **options)

    signature = inspect.signature(rule)
    w, codes, *others = signature.parameters.values()
    quantizer = codes.replace(name="quantizer", annotation=Quantizer)
    estimator.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[w, quantizer, *others]
    )
    estimator.rule = rule  # type: ignore[attr-defined]
    return estimator


def rule_of_codes(estimator: Callable[..., Array]) -> Callable[..., Array] | None:
    """The rule that `from_codes` made an estimator of, with its options; None for any other."""
    if isinstance(estimator, functools.partial) and not estimator.args:
        rule = rule_of_codes(estimator.func)
        return rule and functools.partial(rule, **estimator.keywords)
    return getattr(estimator, "rule", None)


def full_precision(w: Array, quantizer: Quantizer, alpha: ArrayLike) -> Array:
    """The weight itself: training in floating point."""
    return w


@from_codes
def straight_through(w: Array, codes: Quantized, alpha: ArrayLike) -> Array:
    """`Q(w)` whatever alpha is, with the gradient of `w`: the STE (arXiv 1308.3432)."""
    return replace_value(w, codes.dequantize())


@from_codes
def soft_straight_through(w: Array, codes: Quantized, alpha: ArrayLike) -> Array:
    """AB's value with the gradient of `w`: the form of BinaryRelax (arXiv 1801.06313)."""
    return replace_value(w, blended_value(w, codes.dequantize(), alpha))


@from_codes
def alpha_blend(w: Array, codes: Quantized, alpha: ArrayLike) -> Array:
    """`(1 - alpha) * w + alpha * stop_gradient(Q(w))` with its own gradient (arXiv 1903.01061)."""
    return blended_value(w, codes.dequantize(), alpha)


@from_codes
def compensated_alpha_blend(
    w: Array, codes: Quantized, alpha: ArrayLike, *, cap: float = 8.0
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
    value = blended_value(w, codes.dequantize(), alpha)
    return replace_value(_scaled(w, jnp.minimum(1, cap * _remainder(w, alpha))), value)


@from_codes
def alpha_blend_then_straight_through(w: Array, codes: Quantized, alpha: ArrayLike) -> Array:
    """AB while alpha is below 1, STE once it is 1: AB as the warm-up of STE.

    At alpha 1 codes may change again. Let the ramp end early, or there is no STE to speak of.
    """
    value = blended_value(w, codes.dequantize(), alpha)
    rest = _remainder(w, alpha)
    return replace_value(_scaled(w, jnp.where(rest == 0, 1, rest)), value)


@from_codes
def parq(w: Array, codes: Quantized, alpha: ArrayLike) -> Array:
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
    latent = lax.stop_gradient(w)
    below, above = codes.beside(latent)
    middle = below / 2 + above / 2
    alpha = jnp.asarray(alpha, dtype)
    inverse_slope = jnp.where(alpha == 1, 1, 1 - alpha)
    mapped = jnp.clip(middle + (latent.astype(dtype) - middle) / inverse_slope, below, above)
    value = select(alpha == 1, codes.dequantize(), mapped.astype(w.dtype))
    return replace_value(w, select(alpha == 0, latent, value))


def blended_value(w: Array, q: Array, alpha: ArrayLike) -> Array:
    """`(1 - alpha) * w + alpha * q` in the dtype of `w`: `w` at alpha 0, `q` at 1, bit for bit.

    The arithmetic alone would not give the two ends: -0.0, subnormal and infinite weights do not
    survive it.
    """
    # The gradient is that of the sum, at the two ends too.
    return replace_value(*blended_sum_and_value(w, q, alpha))


def blended_sum_and_value(w: Array, q: Array, alpha: ArrayLike) -> tuple[Array, Array]:
    """The sum that `blended_value` has the gradient of, and its value, which has none.

    Of primitives, here and where inputs are quantized: tracing a function of `jax.numpy` for the
    first time takes five times as long.
    """
    dtype = compute_dtype(w.dtype)
    zero, one = np.arange(2, dtype=dtype)
    alpha, w32, q32 = (lax.convert_element_type(v, dtype) for v in (alpha, w, q))
    mixed = lax.add(lax.mul(lax.sub(one, alpha), w32), lax.mul(alpha, q32))
    mixed = lax.convert_element_type(mixed, w.dtype)
    # As `select`, twice.
    bits = lax.select(lax.eq(alpha, one), _bits(q), _bits(mixed))
    bits = lax.select(lax.eq(alpha, zero), _bits(w), bits)
    return mixed, lax.bitcast_convert_type(bits, w.dtype)


def with_nan_seen(effective: Array, w: Array, alpha: ArrayLike) -> Array:
    """What a rule made of `w`, but NaN where that is NaN or infinite; at alpha 0 also such a `w`.

    Codes at what was fitted of other weights cannot show such a one. Weight by weight, which is
    part of the loop that blends, where `ab_jax.quantized.with_nan_shown` has to look at blocks.
    """
    stays = (jnp.asarray(alpha, compute_dtype(w.dtype)) == 0) & ~jnp.isfinite(effective)
    seen = select(jnp.isfinite(w) | stays, effective, jnp.full_like(effective, jnp.nan))
    return replace_value(effective, seen)


def select(condition: Array, one: Array, other: Array) -> Array:
    """`one` where the condition holds, else `other`, bit for bit and without a gradient.

    Args:
      condition: bool, a scalar or of the shape of the two.
      one, other: of one shape and one floating-point dtype.
    """
    # Compilers may widen half precision around a selection, and flush subnormal numbers as they
    # round back. They leave integers alone.
    # A scalar condition as it is: spread out, it would be read at each element.
    chosen = lax.select(condition, _bits(one), _bits(other))
    return lax.bitcast_convert_type(chosen, one.dtype)


@functools.partial(jax.jit, inline=True)  # as one operation outside of a compiled function too
def computed_once(w: Array) -> Array:
    """`w`, bit for bit and with its gradient, in a form that compilers do not compute twice.

    XLA on CPUs computes anew, wherever a loop reads it, what it takes for cheap: all of the blend,
    at each position of each image, where a weight is multiplied with images by channel, as in
    `ab_jax.models.depthwise`. An optimization barrier does not help, since it is removed before
    loops are fused. What is never computed anew within a loop that reads it many times is a
    reduction. So this is one, the OR of the bits and of zeros, and takes no time: it is part of the
    loop that computes `w`.

    Args:
      w: floating point.
    """
    bits = _bits(w)
    padding = [(0, 1, 0), *[(0, 0, 0)] * w.ndim]
    rows = lax.pad(bits[None], jnp.zeros((), bits.dtype), padding)
    whole = lax.reduce_or(rows, axes=(0,))
    return replace_value(w, lax.bitcast_convert_type(whole, w.dtype))


def _bits(x: Array) -> Array:
    """The bits of floating-point numbers, as unsigned integers of their size."""
    dtype = np.dtype(f"uint{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, dtype)  # through which no gradient passes


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
