"""From rules over parameter paths to a blended, quantized or described tree of parameters.

    rules = Rules([(r"(stem|head)/kernel", Uniform(bits=8)),
                   (r"(.*/)?kernel", Uniform(bits=4)),
                   (r".*", None)])
    effective = blend(params, rules, alpha)     # inside the loss
    deployed = quantize(params, rules)          # integer codes and scales

Scales that are trained themselves are a second tree, made from the first:

    scales = initial_scales(params, rules)
    effective = blend(params, rules, 1.0, estimator=learned_step_size, scales=scales)
    deployed = quantize(params, rules, scales=scales)

The path of a leaf is its keys, attribute names and indices joined by `/`: `layers/0/kernel`. The
attribute `value` of an NNX Variable is no part of it, so that one rule serves every framework; any
other `value` is. Any tree of arrays will do; leaves that are no floating-point arrays (counters,
random keys, functions) are left alone by a rule that maps them to None. Two leaves of one path are
refused.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ab_jax.carried_fits import Fit, check_carried, fit_of
from ab_jax.describe import quantized_paths
from ab_jax.estimators import (
    Estimator,
    ScaledEstimator,
    alpha_blend,
    check_takes_scale,
    computed_once,
    rule_of_codes,
    with_nan_seen,
)
from ab_jax.fitting import codes_at
from ab_jax.learned_scales import (
    SMALLEST_SCALE,
    Scales,
    check_scales,
    initial_scale,
    quantize_at,
)
from ab_jax.quantized import BinaryCoded, with_nan_shown
from ab_jax.quantizers import Quantized, Quantizer
from ab_jax.rules import Rules, assigned, leaves_by_path
from ab_jax.rules import check_fits as check_leaf

Tree = TypeVar("Tree")
Alpha = ArrayLike | Callable[[str], ArrayLike]
AlphaSchedule = Callable[[ArrayLike], Alpha]  # of the step


def blend(
    params: Tree,
    rules: Rules,
    alpha: Alpha,
    *,
    estimator: Estimator | ScaledEstimator = alpha_blend,
    scales: Scales | None = None,
    fits: Mapping[str, Fit] | None = None,
) -> Tree:
    """Replace each parameter that a rule quantizes by what the loss shall see of it.

    At alpha 0 `alpha_blend` returns the parameters, at 1 the dequantized codes, bit for bit.

    Args:
      params: a tree of arrays of any shapes.
      rules: which parameter gets which quantizer.
      alpha: how far the parameters have moved towards their quantized values: a scalar in [0, 1],
        or a function of the path that returns one, where layers follow ramps of their own.
      estimator: the rule for value and gradient (`ab_jax.estimators`).
      scales: for an estimator that trains them too (`ab_jax.learned_step_size`): by path, as
        `initial_scales` makes them.
      fits: at what `fit` found earlier, and not at what the quantizers fit of these parameters.
        A weight that is NaN or infinite is NaN then too, where the codes are to be seen of it.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: rules that do not fit the parameters (see `Rules.assign` and `Quantizer`); two
        parameters of one path; an alpha outside [0, 1]; scales that are not those of the
        parameters, or given to an estimator that takes none, or missing; fits of parameters of
        other paths or shapes or of other quantizers, or given to an estimator that fits for itself.
        TypeError: a quantizer for a leaf that is not floating point; an alpha that is no number;
        rules, an estimator, scales or fits that are none.
    """
    if not callable(alpha):
        check_alpha(alpha, "")
    check_takes_scale(estimator, scales is not None)
    layers = _quantized_layers(params, rules)
    if scales is not None:
        check_scales(scales, layers)
    rule = rule_of_codes(estimator)
    if fits is not None:
        if rule is None:
            raise ValueError(
                f"The estimator {getattr(estimator, '__name__', estimator)} fits for itself. "
                f"Omit fits=, or write it as a rule under ab_jax.estimators.from_codes."
            )
        check_carried(fits, layers)
    seen = {}
    for path, (w, quantizer) in layers.items():
        own_alpha = alpha
        if callable(own_alpha):
            own_alpha = own_alpha(path)
            check_alpha(own_alpha, f" for {path}")
        if fits is not None and rule is not None:
            effective = rule(w, codes_at(w, fits[path].fitted, quantizer), own_alpha)
            effective = with_nan_seen(effective, w, own_alpha)
        else:
            scale = () if scales is None else (jnp.asarray(scales[path]),)
            estimate: Callable[..., Array] = estimator
            effective = estimate(w, quantizer, own_alpha, *scale)
        seen[path] = effective if effective is w else computed_once(effective)
    return _replaced(params, seen)


def fit(params: Any, rules: Rules) -> dict[str, Fit]:
    """What the quantizers fit of the parameters as they are now, to `blend` with for some steps.

    A fit takes far longer than a blend at what was fitted. A scale that is some steps old is hardly
    worse while weights move slowly:

        fits = jax.lax.cond(step % 8 == 0, lambda: ab.fit(params, rules), lambda: fits)
        effective = ab.blend(params, rules, alpha, fits=fits)

    `quantize` fits anew: where the loss shall see the very codes that it gives, fit at each step.

    Returns:
      By the path of each parameter that a rule quantizes: a tree of arrays, scales among them,
      with the quantizer and the parameter's shape, by which `blend` refuses it for others. Under
      `jax.vmap` (an ensemble) the shape is that of a member, as it is where `blend` is mapped too.

    Raises:
      ValueError, TypeError: as `blend`.
    """
    return {
        path: fit_of(w, quantizer)
        for path, (w, quantizer) in _quantized_layers(params, rules).items()
    }


def mean_alpha(params: Any, rules: Rules, alpha: Alpha) -> ArrayLike:
    """One number for an alpha: the mean over the quantized parameters, each counting alike.

    A scalar alpha is returned as it is. The mean is 0 or 1 only where all are.

    Raises:
      ValueError: an alpha by path where no parameter is quantized; otherwise, and TypeError, as
        `blend`.
    """
    if not callable(alpha):
        return alpha
    paths = quantized_paths(params, rules)
    if not paths:
        raise ValueError(
            "Alpha is a function of the path, but the rules quantize no parameter. Give a scalar."
        )
    alphas = jnp.stack([jnp.asarray(alpha(path), jnp.float32) for path in paths])
    # Rounding must not take a mean to an end that not all have reached.
    between = jnp.clip(jnp.mean(alphas), 2.0**-24, 1 - 2.0**-24)
    return jnp.where(jnp.all(alphas == 1), 1.0, jnp.where(jnp.all(alphas == 0), 0.0, between))


def initial_scales(params: Any, rules: Rules) -> dict[str, Array]:
    """Scales to train beside the parameters, from the weights as they are (LSQ, section 2.1).

    Returns:
      By the path of each parameter that a rule quantizes, float32 (float64 for float64 weights) of
      shape `quantizer.scale_shape(parameter.shape)`.

    Raises:
      ValueError, TypeError: as `blend`; a quantizer whose scale cannot be learned (one with zero
        points or a fixed scale).
    """
    scales: dict[str, Array] = {}
    for path, (w, quantizer) in _quantized_layers(params, rules).items():
        try:
            scales[path] = initial_scale(w, quantizer)
        except ValueError as error:
            raise ValueError(f"Parameter {path}: {error}") from None
    return scales


def scales_of(codes: Any) -> dict[str, Array]:
    """The scales of codes, for `quantize` and for estimators that take scales.

    Args:
      codes: a tree with `Quantized` in it, as `quantize` and calibration return it.

    Returns:
      By the path of each `Quantized`, its scale; 2**-100 where that is 0, which is a block of
      zeros.

    Raises:
      ValueError: codes that are no symmetric, evenly spaced levels; names the path.
    """
    scales: dict[str, Array] = {}
    for path, leaf in leaves_by_path(codes, _is_quantized):
        if not _is_quantized(leaf):
            continue
        if leaf.zero_point is not None or isinstance(leaf, BinaryCoded):
            kind = "a zero point" if leaf.zero_point is not None else "a scale for each bit"
            raise ValueError(
                f"The codes of {path} have {kind}, and nothing is trained at such scales. Take "
                f"Binary, Ternary or a symmetric Uniform."
            )
        scales[path] = jnp.maximum(leaf.scale, SMALLEST_SCALE)
    return scales


def quantize(params: Any, rules: Rules, *, scales: Scales | None = None) -> Any:
    """The tree with a `Quantized` (codes and scales) in place of each leaf that a rule quantizes.

    Made once, these are the codes to evaluate and to export. The same fit compiled into another
    program may differ in the last bit of a scale. Weights that are NaN or infinite make the scale
    that they share NaN, also where a fixed or trained one would hide them: no file takes it.

    Args:
      params, rules: as for `blend`.
      scales: by path those that were trained; None: the quantizers fit their own.

    Raises:
      ValueError, TypeError: as `blend`.
    """

    layers = _quantized_layers(params, rules)
    if scales is not None:
        check_scales(scales, layers)
    codes = {}
    for path, (w, quantizer) in layers.items():
        found = (
            quantizer.quantize(w)
            if scales is None
            else quantize_at(w, jnp.asarray(scales[path]), quantizer)
        )
        codes[path] = with_nan_shown(found, w)
    return _replaced(params, codes)


def dequantize(params: Any) -> Any:
    """The tree with the value of its codes in place of each `Quantized`."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if _is_quantized(leaf) else leaf,
        params,
        is_leaf=_is_quantized,
    )


def clip_latent(params: Tree, rules: Rules, *, limit: float = 1.0) -> Tree:
    """Clip the stored weights that a rule quantizes to [-limit, limit].

    BinaryConnect and BinaryNet do so after each update (arXiv 1511.00363, section 2.4), since a
    weight far outside no longer changes its sign. Call it on what `optax.apply_updates` returns.

    Raises:
      ValueError: a limit that is no positive number; otherwise as `blend`.
    """
    if not isinstance(limit, (int, float, np.number, np.ndarray, Array)) or not limit > 0:
        raise ValueError(f"clip_latent takes a positive limit, not limit={limit!r}.")
    layers = _quantized_layers(params, rules)
    return _replaced(params, {path: jnp.clip(w, -limit, limit) for path, (w, _) in layers.items()})


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def check_alpha(alpha: ArrayLike, where: str) -> None:
    """Refuse an alpha that is no scalar in [0, 1].

    Args:
      alpha: one that is traced is not looked at.
      where: what the message says of its place, such as " for dense/kernel".

    Raises:
      ValueError: it is not in [0, 1], or no scalar. TypeError: it is no number.
    """
    if not isinstance(alpha, (Array, np.ndarray, np.number, int, float)):
        raise TypeError(f"alpha{where} must be a scalar in [0, 1], not {alpha!r}.")
    if jnp.shape(alpha) != ():
        raise ValueError(
            f"alpha{where} must be a scalar, not an array of shape {jnp.shape(alpha)}."
        )
    # A traced alpha cannot be looked at; it comes from a ramp, which stays inside [0, 1].
    if not isinstance(alpha, jax.core.Tracer) and not 0 <= float(np.asarray(alpha)) <= 1:
        raise ValueError(
            f"alpha{where} is {alpha}, but must lie in [0, 1]. Ramps such as "
            f"ab_jax.cubic_ramp(start, stop) stay inside."
        )


def _quantized_layers(params: Any, rules: Rules) -> dict[str, tuple[Array, Quantizer]]:
    """By path the parameters that get a quantizer, with that; an error about one names its path."""
    leaves, chosen, _ = assigned(params, rules)
    layers = {}
    for (path, leaf), index in zip(leaves, chosen, strict=True):
        pattern, quantizer = rules.rules[index]
        if quantizer is not None:
            check_leaf(path, leaf, pattern, quantizer)
            layers[path] = jnp.asarray(leaf), quantizer
    return layers


def _replaced(params: Tree, by_path: Mapping[str, Any]) -> Tree:
    """The tree with other leaves at some paths."""
    leaves = [by_path.get(path, leaf) for path, leaf in leaves_by_path(params)]
    replaced: Tree = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return replaced
