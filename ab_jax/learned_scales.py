"""Learned step sizes (LSQ, arXiv 1902.08153): the scale of a quantizer as a trained parameter.

With codes from -Q to Q and the scale s of a block of N weights (sections 2 to 2.2 of the paper):

    value              v = round(clip(w / s, -Q, Q)) * s
    gradient to w      1 where -Q < w / s < Q, else 0
    gradient to s      g * (round(w / s) - w / s) there, g * -Q below and g * Q above
    gradient scale     g = 1 / sqrt(N * Q)
    first scale        s = 2 * mean|w| / sqrt(Q)

Our choice, where the paper is silent or the house has its own way: levels are the same on both
sides of 0 (the paper has one more below); a block is what the quantizer's `axis` and `group_size`
say (the paper: the whole tensor); and one bit has the codes -1 and +1, with the formulas at Q = 1.

A step past zero would turn the signs of a block's weights, and one to zero divide by it. So what
counts of a trained number is its magnitude (`usable_scale`), in the loss and in the codes alike:
the network at -s is that at s, the gradient is that of the magnitude, and a number that has crossed
zero is a scale as good as any. `keep_scales_positive` goes further: with it an update at most
halves a scale.

What is trained is a second tree beside the parameters, a dictionary from a parameter's path to its
scales. `ab_jax.initial_scales` makes it, `ab_jax.blend` and `ab_jax.quantize` take it. Scales that
are given and stay as they are, those of a calibration say, are such a tree too
(`ab_jax.scales_of`): with `at_fixed_scales` the other estimators take it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ab_jax.estimators import ScaledEstimator, replace_value, rule_of_codes, with_nan_seen
from ab_jax.quantized import expand
from ab_jax.quantizers import Binary, Quantized, Quantizer, Ternary, Uniform
from ab_jax.scale_fits import block_axes, compute_dtype, limits

Scales = Mapping[str, Array]

#: Far below any scale of use, and far above the numbers that devices flush to zero.
SMALLEST_SCALE = 2.0**-100


def learned_step_size(w: Array, quantizer: Quantizer, alpha: ArrayLike, scale: Array) -> Array:
    """The value of the codes of `w` at a trained scale, with the gradients of the paper.

    Args:
      w: a floating-point weight of any shape.
      quantizer: `Binary`, `Ternary` or a symmetric `Uniform`. It gives the levels and says which
        weights share a scale; how it would fit the scale plays no part.
      alpha: plays no part: the forward pass is quantized from the start.
      scale: of shape `quantizer.scale_shape(w.shape)`; float32 (float64 for float64 `w`). It counts
        as `usable_scale` has it: by its magnitude.

    Returns:
      An array of the shape and dtype of `w`; NaN where `w` is NaN or infinite.

    Raises:
      ValueError: a quantizer whose scale cannot be learned.
    """
    highest = highest_level(quantizer)
    value = quantize_at(*jax.lax.stop_gradient((w, scale)), quantizer)
    relative = jax.lax.stop_gradient(w.astype(scale.dtype) / expand(value.scale, w.shape))
    inside = jnp.abs(relative) < highest
    codes = value.codes.astype(scale.dtype)
    slope = jnp.where(inside, codes - relative, codes)
    per_block = w.size // math.prod(scale.shape)
    # Its value is of no account, its gradients are those above: to a scale, `slope` times g.
    # That of the magnitude; at 0 upwards, where `jnp.abs` would have none.
    scaled = jnp.where(scale < 0, -scale, scale) / math.sqrt(per_block * highest)
    graph = jnp.where(inside, w.astype(scale.dtype), 0) + slope * expand(scaled, w.shape)
    return replace_value(graph.astype(w.dtype), with_nan_seen(value.dequantize(), w, 1))


def at_fixed_scales(estimator: Callable[..., Array]) -> ScaledEstimator:
    """The estimator at scales that are given, in place of those that a quantizer fits.

    No gradient reaches them: an optimizer that has them leaves them as they are. So a calibrated
    network is trained at the scales of its codes:

        found = calibrate(forward, params, rules, batches)
        estimator, scales = at_fixed_scales(alpha_blend), ab.scales_of(found.codes)
        effective = ab.blend(found.params, rules, alpha, estimator=estimator, scales=scales)
        deployed = ab.quantize(found.params, rules, scales=scales)

    Args:
      estimator: a rule of codes (`ab_jax.estimators.from_codes`), as `straight_through`,
        `alpha_blend`, `parq` and their like are.

    Returns:
      `(w, quantizer, alpha, scale) -> w_eff`, for the quantizers and scales that
      `learned_step_size` takes.

    Raises:
      ValueError: another estimator.
    """
    rule = rule_of_codes(estimator)
    name = getattr(estimator, "__name__", repr(estimator))
    if rule is None:
        raise ValueError(
            f"The estimator {name} fits for itself, or needs no scales. Write it as a rule under "
            f"ab_jax.estimators.from_codes, or omit the scales."
        )

    def at_scale(w: Array, quantizer: Quantizer, alpha: ArrayLike, scale: Array) -> Array:
        codes = quantize_at(*jax.lax.stop_gradient((w, scale)), quantizer)
        return with_nan_seen(rule(w, codes, alpha), w, alpha)

    at_scale.__name__ = f"at_fixed_scales({name})"  # by which errors name it
    return at_scale


def highest_level(quantizer: Quantizer) -> int:
    """Q: the highest code, and the lowest with its sign changed.

    Raises:
      ValueError: a quantizer whose scale cannot be learned.
    """
    match quantizer:
        case Binary(fixed_scale=None) | Ternary():
            return 1
        case Uniform(symmetric=True):
            return int(2 ** (quantizer.bits - 1) - 1)
    raise ValueError(
        f"The scales of {quantizer} cannot be learned: that takes Binary without fixed_scale, "
        f"Ternary or a symmetric Uniform."
    )


@functools.partial(jax.jit, static_argnames="quantizer")
def initial_scale(w: Array, quantizer: Quantizer) -> Array:
    """`2 * mean|w| / sqrt(Q)` of each block; 1 where that is too small to divide by.

    Args:
      w: a floating-point weight of any shape.
      quantizer: as for `learned_step_size`.

    Returns:
      float32 (float64 for float64 `w`) of shape `quantizer.scale_shape(w.shape)`.
    """
    shape = quantizer.scale_shape(w.shape)
    split, inside = block_axes(w.shape, shape)
    blocks = jnp.abs(w.astype(compute_dtype(w.dtype))).reshape(split)
    per_block = w.size // math.prod(shape)
    # Each term is divided by the count, so that a sum of numbers near 1e38 does not overflow.
    mean = jnp.sum(blocks / per_block, inside).reshape(shape)
    scale = 2 / math.sqrt(highest_level(quantizer)) * mean
    return jnp.where(scale < SMALLEST_SCALE, 1, scale)


@functools.partial(jax.jit, static_argnames="quantizer")
def quantize_at(w: Array, scale: Array, quantizer: Quantizer) -> Quantized:
    """Codes of `w` at these scales; jitted, so that every caller gets the same integers.

    Args:
      w, quantizer, scale: as for `learned_step_size`.

    Raises:
      ValueError: a quantizer whose scale cannot be learned.
    """
    highest = highest_level(quantizer)
    scale = usable_scale(scale, quantizer, w.dtype)
    if isinstance(quantizer, Binary):
        codes = jnp.where(w >= 0, 1, -1)
    else:
        relative = w.astype(scale.dtype) / expand(scale, w.shape)
        codes = jnp.round(jnp.clip(relative, -highest, highest))
    return Quantized(
        codes=codes.astype(jnp.int8),
        scale=scale,
        zero_point=None,
        bits=quantizer.bits,
        dtype=w.dtype.name,
    )


def usable_scale(scale: Array, quantizer: Quantizer, dtype: Any) -> Array:
    """What a trained number counts as: its magnitude, where that can serve as a scale.

    At least 2**-100, so that weights can be divided by it, and no larger than that all levels are
    numbers of the weights' dtype. NaN and infinity stay, to be seen in the loss.

    Args:
      scale: as for `learned_step_size`.
      quantizer: as for `learned_step_size`.
      dtype: of the weights.

    Raises:
      ValueError: a quantizer whose scale cannot be learned.
    """
    # Just below the largest, since products round.
    largest = limits(dtype)[1] * (1 - 2**-20) / highest_level(quantizer)
    magnitude = jnp.abs(scale)
    usable = jnp.clip(magnitude, SMALLEST_SCALE, largest)
    return jnp.where(jnp.isfinite(magnitude), usable, magnitude)


def keep_scales_positive(scales: Any, previous: Any) -> Any:
    """The scales after an update, none below half of what it was.

    A step past zero makes a scale of the overshoot (`usable_scale`), however large or small that
    is. With this it halves the scale, and the gradients that follow can raise it again.

    Args:
      scales: what `optax.apply_updates` returned, a tree of arrays.
      previous: the positive scales before the update, a tree like it.
    """
    return jax.tree.map(
        lambda new, old: jnp.maximum(new, jnp.maximum(old / 2, SMALLEST_SCALE)), scales, previous
    )


def check_scales(scales: Scales, quantized: Mapping[str, tuple[Any, Quantizer]]) -> None:
    """Refuse scales that are not those of the parameters.

    Args:
      scales: by path.
      quantized: by path the parameter that a rule quantizes, and its quantizer.

    Raises:
      ValueError: names the first path whose scale is missing, in excess, of another shape or dtype,
        or (where its numbers are at hand) not positive and finite. TypeError: they are no
        dictionary from paths to arrays.
    """
    again = "Make them by ab_jax.initial_scales(params, rules), of these parameters and rules."
    if not isinstance(scales, Mapping):
        raise TypeError(f"scales must be a dictionary, not {type(scales).__name__}. {again}")
    for path in sorted({*scales, *quantized}):
        if path not in scales:
            raise ValueError(f"There is no scale for {path}, which a rule quantizes. {again}")
        if path not in quantized:
            raise ValueError(f"There is a scale for {path}, which no rule quantizes. {again}")
        leaf, quantizer = quantized[path]
        scale: Any = scales[path]
        if not (hasattr(scale, "dtype") or isinstance(scale, (int, float))):
            raise TypeError(f"The scale of {path} is {scale!r}, no array. {again}")
        wanted = quantizer.scale_shape(leaf.shape), jnp.dtype(compute_dtype(leaf.dtype))
        found = jnp.shape(scale), jnp.result_type(scale)
        if found != wanted:
            raise ValueError(
                f"The scale of {path} is {found[1]}{list(found[0])}, not "
                f"{wanted[1]}{list(wanted[0])}. {again}"
            )
        # A traced scale cannot be looked at, nor one that lies with other processes.
        known = not isinstance(scale, jax.core.Tracer)
        if known and getattr(scale, "is_fully_addressable", True):
            numbers = np.asarray(scale)
            if not (np.all(numbers > 0) and np.all(np.isfinite(numbers))):
                raise ValueError(
                    f"The scale of {path} holds what is not positive and finite. Call "
                    f"ab_jax.keep_scales_positive after each update, or lower the learning rate. "
                    f"Where it is negative, the loss saw its magnitude: jnp.abs gives that network."
                )
