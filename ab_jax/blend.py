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

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ab_jax.describe import quantized_paths
from ab_jax.estimators import Estimator, ScaledEstimator, alpha_blend, check_takes_scale
from ab_jax.learned_scales import Scales, check_scales, initial_scale, quantize_at
from ab_jax.quantized import with_nan_shown
from ab_jax.quantizers import Quantized, Quantizer
from ab_jax.rules import Rules, assigned, check_fits

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

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: rules that do not fit the parameters (see `Rules.assign` and `Quantizer`); two
        parameters of one path; an alpha outside [0, 1]; scales that are not those of the
        parameters, or given to an estimator that takes none, or missing. TypeError: a quantizer for
        a leaf that is not floating point; an alpha that is no number.
    """
    if not callable(alpha):
        _check_alpha(alpha, "")
    check_takes_scale(estimator, scales is not None)
    estimate: Callable[..., Array] = estimator

    def replace(path: str, leaf: Any, quantizer: Quantizer, *scale: Array) -> Array:
        if not callable(alpha):
            return estimate(jnp.asarray(leaf), quantizer, alpha, *scale)
        own_alpha = alpha(path)
        _check_alpha(own_alpha, f" for {path}")
        return estimate(jnp.asarray(leaf), quantizer, own_alpha, *scale)

    return _map_quantized(replace, params, rules, scales)


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

    def note(path: str, leaf: Any, quantizer: Quantizer) -> None:
        try:
            scales[path] = initial_scale(jnp.asarray(leaf), quantizer)
        except ValueError as error:
            raise ValueError(f"Parameter {path}: {error}") from None

    _map_quantized(note, params, rules)
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

    def replace(path: str, leaf: Any, quantizer: Quantizer, *scale: Array) -> Quantized:
        leaf = jnp.asarray(leaf)
        if scale:
            return with_nan_shown(quantize_at(leaf, *scale, quantizer), leaf)
        return with_nan_shown(quantizer.quantize(leaf), leaf)

    return _map_quantized(replace, params, rules, scales)


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
      ValueError: a limit that is not positive; otherwise as `blend`.
    """
    if not limit > 0:
        raise ValueError(f"clip_latent takes a positive limit, not limit={limit!r}.")
    return _map_quantized(lambda path, leaf, _: jnp.clip(leaf, -limit, limit), params, rules)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _check_alpha(alpha: ArrayLike, where: str) -> None:
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


def _map_quantized(
    replace: Callable[..., Any], params: Any, rules: Rules, scales: Scales | None = None
) -> Any:
    """Replace the leaves that get a quantizer; an error about one of them names its path.

    `replace` gets the path, the leaf, the quantizer, and the leaf's scale if there are scales.
    """
    leaves, chosen, structure = assigned(params, rules)
    quantizers = [rules.rules[index][1] for index in chosen]
    quantized = {}
    for (path, leaf), index, quantizer in zip(leaves, chosen, quantizers, strict=True):
        if quantizer is not None:
            check_fits(path, leaf, rules.rules[index][0], quantizer)
            quantized[path] = leaf, quantizer
    if scales is not None:
        check_scales(scales, quantized)
    new_leaves = []
    for (path, leaf), quantizer in zip(leaves, quantizers, strict=True):
        if quantizer is not None:
            scale = () if scales is None else (jnp.asarray(scales[path]),)
            leaf = replace(path, leaf, quantizer, *scale)
        new_leaves.append(leaf)
    return jax.tree.unflatten(structure, new_leaves)
