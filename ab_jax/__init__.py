"""Alpha-blending (AB) quantization for JAX (arXiv 1903.01061): pure functions over parameter trees.

Importing `ab_jax` loads jax and optax alone; models, data and training are imported by name.
"""

from ab_jax.blend import (
    blend,
    clip_latent,
    dequantize,
    fit,
    initial_scales,
    mean_alpha,
    quantize,
    scales_of,
)
from ab_jax.carried_fits import Fit
from ab_jax.describe import Description, describe, quantized_paths
from ab_jax.estimators import (
    Estimator,
    ScaledEstimator,
    alpha_blend,
    alpha_blend_then_straight_through,
    compensated_alpha_blend,
    full_precision,
    parq,
    replace_value,
    soft_straight_through,
    straight_through,
)
from ab_jax.learned_scales import at_fixed_scales, keep_scales_positive, learned_step_size
from ab_jax.moved import answer_by_old_names
from ab_jax.quantized import BinaryCoded, Quantized
from ab_jax.quantizers import Binary, LeastSquaresBinary, Quantizer, Ternary, Uniform
from ab_jax.rules import Rules
from ab_jax.schedules import (
    cosine_ramp,
    cubic_ramp,
    jump,
    layerwise_ramp,
    linear_ramp,
    sigmoid_ramp,
)
from ab_jax.weight_decay import decay_with_gradient

__version__ = "0.2.0"

answer_by_old_names()

__all__ = [
    "Binary",
    "BinaryCoded",
    "Description",
    "Estimator",
    "Fit",
    "LeastSquaresBinary",
    "Quantized",
    "Quantizer",
    "Rules",
    "ScaledEstimator",
    "Ternary",
    "Uniform",
    "alpha_blend",
    "alpha_blend_then_straight_through",
    "at_fixed_scales",
    "blend",
    "clip_latent",
    "compensated_alpha_blend",
    "cosine_ramp",
    "cubic_ramp",
    "decay_with_gradient",
    "dequantize",
    "describe",
    "fit",
    "full_precision",
    "initial_scales",
    "jump",
    "keep_scales_positive",
    "layerwise_ramp",
    "learned_step_size",
    "linear_ramp",
    "mean_alpha",
    "parq",
    "quantize",
    "quantized_paths",
    "replace_value",
    "scales_of",
    "sigmoid_ramp",
    "soft_straight_through",
    "straight_through",
]
