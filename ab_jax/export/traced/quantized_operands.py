"""Quantized inputs of products as primitives of their own, so that graphs see what they are.

`quantize` is `ActivationQuantizer` at alpha 1: `(x, limit) -> x` by its quantizer, `limit` the end
of the range. `quantize_tokens` is `TokenQuantizer`, whose tokens lie along `axes`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.products import ActivationRules, Product, Range, initial_ranges, intercept
from ab_jax.products.input_rules import addresses_with_rules

quantize_p = Primitive("quantize")
quantize_tokens_p = Primitive("quantize_tokens")


def _quantize(x: Array, limit: Array, *, quantizer: ActivationQuantizer) -> Array:
    return quantizer(x, limit, 1.0)


def _quantize_tokens(x: Array, *, quantizer: TokenQuantizer, axes: tuple[int, ...]) -> Array:
    return quantizer(x, axes, 1.0)


def _as_the_first(x: Any, *_: Any, **params: Any) -> Any:
    return x


for _primitive, _function in ((quantize_p, _quantize), (quantize_tokens_p, _quantize_tokens)):
    _primitive.def_impl(_function)
    _primitive.def_abstract_eval(_as_the_first)
    mlir.register_lowering(_primitive, mlir.lower_fun(_function, multiple_results=False))


def with_quantized_operands(
    f: Callable[..., Any],
    rules: ActivationRules,
    ranges: Mapping[str, Range],
    params: Any,
    inputs: Sequence[Any],
    one_range_a_weight: bool = False,
) -> Callable[..., Any]:
    """`f` with one of the primitives in front of each operand that the rules quantize.

    Args:
      f: of parameters and inputs.
      rules, ranges, one_range_a_weight: as for `ab_jax.products.quantize_inputs`; ranges that the
        rules fix may be left out.
      params, inputs: of `f`, or their shapes.

    Raises:
      ValueError: rules or ranges that do not fit the products, or a range that was never measured.
    """
    wanted = initial_ranges(f, rules, params, *inputs, one_range_a_weight=one_range_a_weight)
    fixed = {a for a in wanted if rules.of(a).limit is not None}
    for address in sorted((wanted.keys() ^ ranges.keys()) - fixed):
        what = (
            f"There is no range for the input of {address}"
            if address in wanted
            else f"There is a range for the input of {address}, to which no rule gives one"
        )
        raise ValueError(f"{what}. Measure them by ab_jax.products.measure_ranges.")
    limits = {a: np.asarray(ranges.get(a, wanted[a]).limit, np.float32) for a in wanted}
    for address, limit in limits.items():
        if address in fixed:
            limits[address] = limit = np.full_like(limit, rules.of(address).limit)
        if limit.shape != wanted[address].limit.shape:
            raise ValueError(
                f"The range of the input of {address} has the shape {limit.shape}, not "
                f"{wanted[address].limit.shape}. Measure it anew."
            )
        if not np.all(np.isfinite(limit) & (limit > 0)):
            raise ValueError(
                f"The range of the input of {address} is {limit}: it was never measured. Measure "
                f"it by ab_jax.products.measure_ranges."
            )

    def addressed(product: Product) -> Product:
        return product.without_count() if one_range_a_weight and product.weight else product

    def chosen(products: Sequence[Product]) -> list[Product]:
        listed = map(addressed, products)
        return [p for p in listed if any(rules.of(a) for a in addresses_with_rules(p))]

    def handler(product: Product, side: int, x: Array, limit: Any) -> tuple[Array, Any]:
        address = product.inputs[side]
        quantizer = rules.of(address)
        if quantizer is None:
            return x, None
        if isinstance(quantizer, TokenQuantizer):
            axes = tuple(product.contracted[side])
            return quantize_tokens_p.bind(x, quantizer=quantizer, axes=axes), None
        if limit is None:
            limit = limits[address]
        return quantize_p.bind(x, jnp.asarray(limit), quantizer=quantizer), None

    # What scans over layers hand out slice by slice; the others are no state of loops.
    stacked = {address: jnp.asarray(limit) for address, limit in limits.items() if limit.shape}

    def quantized(params: Any, *inputs: Any) -> Any:
        return intercept(f, handler, chosen=chosen)(stacked, params, *inputs)[0]

    return quantized
