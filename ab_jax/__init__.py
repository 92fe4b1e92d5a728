"""Alpha-blending (AB) quantization for JAX (arXiv 1903.01061): pure functions over parameter trees.

Importing `ab_jax` loads jax and optax alone; models, data and training are imported by name.
"""

from ab_jax.blend import (
    Description,
    blend,
    clip_latent,
    dequantize,
    describe,
    initial_scales,
    quantize,
)
from ab_jax.estimators import (
    Estimator,
    ScaledEstimator,
    alpha_blend,
    full_precision,
    replace_value,
    soft_straight_through,
    straight_through,
)
from ab_jax.learned_scales import keep_scales_positive, learned_step_size
from ab_jax.quantizers import Binary, Quantized, Quantizer, Ternary, Uniform
from ab_jax.rules import Rules
from ab_jax.schedules import cosine_ramp, cubic_ramp, jump, linear_ramp

__version__ = "0.1.0"

__all__ = [
    "Binary",
    "Description",
    "Estimator",
    "Quantized",
    "Quantizer",
    "Rules",
    "ScaledEstimator",
    "Ternary",
    "Uniform",
    "alpha_blend",
    "blend",
    "clip_latent",
    "cosine_ramp",
    "cubic_ramp",
    "dequantize",
    "describe",
    "full_precision",
    "initial_scales",
    "jump",
    "keep_scales_positive",
    "learned_step_size",
    "linear_ramp",
    "quantize",
    "replace_value",
    "soft_straight_through",
    "straight_through",
]
