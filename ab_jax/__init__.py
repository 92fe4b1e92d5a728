"""Alpha-blending (AB) quantization for JAX (arXiv 1903.01061): pure functions over parameter trees.

Importing `ab_jax` loads jax and optax alone; models, data and training are imported by name.
"""

from ab_jax.blend import Description, blend, clip_latent, dequantize, describe, quantize
from ab_jax.estimators import (
    Estimator,
    alpha_blend,
    alpha_blend_then_straight_through,
    compensated_alpha_blend,
    full_precision,
    replace_value,
    soft_straight_through,
    straight_through,
)
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
    "Ternary",
    "Uniform",
    "alpha_blend",
    "alpha_blend_then_straight_through",
    "blend",
    "clip_latent",
    "compensated_alpha_blend",
    "cosine_ramp",
    "cubic_ramp",
    "dequantize",
    "describe",
    "full_precision",
    "jump",
    "linear_ramp",
    "quantize",
    "replace_value",
    "soft_straight_through",
    "straight_through",
]
