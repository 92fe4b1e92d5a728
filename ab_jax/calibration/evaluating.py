"""How a single equation of a jaxpr is evaluated, a product in the form that is fastest."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend import core

from ab_jax.models.convolution import cpu_conv_general_dilated
from ab_jax.products.intercepting import evaluated


def results_of(jaxpr: Any, equation: Any, *operands: Any) -> list[Any]:
    """The results of an equation of a jaxpr, whose operands are given, literals too."""
    known = {
        v: x
        for v, x in zip(equation.invars, operands, strict=True)
        if not isinstance(v, core.Literal)
    }
    found = evaluated(jaxpr, [equation], known)
    return [found.get(v) for v in equation.outvars]


def product_runner(equation: Any) -> Callable[..., list[Any]]:
    """A product as a compiled function of its operands, on CPUs in its fastest form."""
    primitive = equation.primitive
    return _compiled(primitive, tuple(sorted(equation.params.items(), key=lambda item: item[0])))


@functools.lru_cache(maxsize=256)
def _compiled(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Callable[..., list[Any]]:
    known = dict(params)

    def run(left: Array, right: Array) -> list[Array]:
        if primitive.name == "conv_general_dilated" and jax.default_backend() == "cpu":
            given = {n: x for n, x in known.items() if n in _CONV_PARAMS}
            return [cpu_conv_general_dilated(left, right, **given)]
        return [primitive.bind(left, right, **known)]

    return jax.jit(run)


_CONV_PARAMS = {
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
    *("feature_group_count", "batch_group_count", "precision", "preferred_element_type"),
}
