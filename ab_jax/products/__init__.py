"""Matrix products and convolutions of any function, found in its jaxpr and addressed by weights.

    for product in find_products(forward, params, images):
        print(product)
    quantized = quantize_inputs(forward, rules)

Two passes over the jaxpr: the first (`finding`) says which products there are and what enters them,
the second (`intercepting`) evaluates the function with something in front of their operands.
"""

from ab_jax.products.finding import find_products
from ab_jax.products.input_rules import ActivationRules
from ab_jax.products.intercepting import intercept
from ab_jax.products.marks import mark
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
]
