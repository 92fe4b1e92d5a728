"""Matrix products and convolutions of any function, found in its jaxpr and addressed by weights.

    def forward(params, images): ...                     # of any framework, or of none

    print(describe_products(forward, params, images))    # each with its address, and its line

    rules = ActivationRules([(r"head/kernel", None), (r".*", ActivationQuantizer(bits=8))])
    ranges = measure_ranges(forward, rules, params, [(images,), ...])
    logits, _ = quantize_inputs(forward, rules)(params, images, ranges=ranges)

`forward` takes its parameters as a tree and everything else after it. Flax Linen:
`lambda params, x: model.apply({"params": params}, x)`; Haiku: `model.apply`; Equinox, after
`params, static = eqx.partition(model, eqx.is_inexact_array)`:
`lambda params, x: jax.vmap(eqx.combine(params, static))(x)`. Arrays that it closes over are
constants. For Flax NNX modules `ab_jax.nnx` has all this in one line.

Two passes over the jaxpr: the first (`finding`) says which products there are and what enters them,
the second (`intercepting`) evaluates the function with something in front of their operands.
`quantized_inputs` has a training step.
"""

from ab_jax.products.finding import find_products
from ab_jax.products.input_rules import ActivationRules
from ab_jax.products.intercepting import intercept
from ab_jax.products.marks import mark
from ab_jax.products.moments import second_moments
from ab_jax.products.product import Product
from ab_jax.products.product_table import ProductDescription, describe_products
from ab_jax.products.quantized_inputs import (
    CutOffWarning,
    Ranges,
    check_ranges,
    initial_ranges,
    measure_ranges,
    quantize_inputs,
)
from ab_jax.products.ranges import Range

__all__ = [
    "ActivationRules",
    "CutOffWarning",
    "Product",
    "ProductDescription",
    "Range",
    "Ranges",
    "check_ranges",
    "describe_products",
    "find_products",
    "initial_ranges",
    "intercept",
    "mark",
    "measure_ranges",
    "quantize_inputs",
    "second_moments",
]
