"""Which equations of a jaxpr are products, marks, or programs that may hold products."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from ab_jax.products.marks import address_of

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
# Calls of programs that are no jaxprs, which may hold products of their operands: cuDNN's attention
# among them, which `jax.nn.dot_product_attention` calls if asked.
_PROGRAMS = {
    *("ffi_call", "pure_callback", "io_callback"),
    *("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper"),
    *("dot_product_attention_fp8_fwd", "dot_product_attention_fp8_fwd_wrapper"),
    *("scaled_matmul", "scaled_matmul_wrapper"),
}


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, open or closed, with its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def is_floating(aval: Any) -> bool:
    """Whether an operand is of floats."""
    return jnp.issubdtype(aval.dtype, jnp.floating)


def has_products(jaxpr: Any) -> bool:
    """Whether there is one of these in a jaxpr, or in the bodies of its equations."""
    return any(_is_product(equation) for equation in _equations(jaxpr))


def _is_product(equation: Any) -> bool:
    name = equation.primitive.name
    is_mark = name == "name" and address_of(equation.params["name"]) is not None
    return name in PRODUCTS or is_mark or is_program(equation)


def is_program(equation: Any) -> bool:
    """Whether it calls a program that may be a product: of two matrices or more, for a result."""
    operands = [v.aval for v in equation.invars if getattr(v.aval, "ndim", 0) >= 2]
    matrices = sum(map(is_floating, operands))
    return equation.primitive.name in _PROGRAMS and matrices >= 2 and bool(equation.outvars)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of bodies too."""
    for equation in opened(jaxpr)[0].eqns:
        yield equation
        for sub in core.jaxprs_in_params(equation.params):
            yield from _equations(sub)
