"""Quantized activations in any function: the inputs of its products, by rules over their addresses.

    rules = ActivationRules([
        (r"head/kernel", ActivationQuantizer(bits=8)),
        (r".*",          ActivationQuantizer(bits=4)),
    ])
    ranges = initial_ranges(forward, rules, params, images)      # forward(params, images)

    def loss_fn(params, ranges, images, labels, step):           # has_aux=True
        quantized = quantize_inputs(forward, rules)
        effective = ab.blend(params, weight_rules, alpha(step))
        now = alpha(step)
        logits, ranges = quantized(effective, images, ranges=ranges, alpha=now, measure=True)
        return loss(logits, labels), ranges

The function may be of any framework, as long as it takes its parameters as a tree. It is evaluated
product by product (`ab_jax.products.intercept`).

Ranges are a dictionary by address. They are measured where `measure` says so, as batch norm's
statistics are in training, and stay as they are elsewhere: in evaluation, at alpha 1. Of a network
that is trained already `measure_ranges` measures them on some batches.

What attention makes of its softmax is the operand called `product` of the second product:

    (r".*/product#1/product", ActivationQuantizer(bits=8, signed=False, limit=1.0))
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.blend import check_alpha
from ab_jax.products.finding import Parting, find_products
from ab_jax.products.flags import Flags, without_flags
from ab_jax.products.input_rules import ActivationRules, addresses_with_rules
from ab_jax.products.intercepting import intercept, refuse_opaque
from ab_jax.products.origins import AROUND
from ab_jax.products.product import Product
from ab_jax.products.ranges import InPass, Range

Ranges = dict[str, Range]


class CutOffWarning(UserWarning):
    """An unsigned range cuts off negative values."""


def quantize_inputs(
    f: Callable[..., Any],
    rules: ActivationRules,
    *,
    axis_name: str | None = None,
    one_range_a_weight: bool = False,
    partly: bool = False,
) -> Callable[..., tuple[Any, Ranges]]:
    """`f` with quantized inputs of its products.

    Args:
      f: `f(params, *inputs)`, the forward function, that JAX can trace. Inputs that are Python's
        bools or strings are given to it as they are (under `jax.jit` if they are static there);
        keywords by `functools.partial`.
      rules: by the addresses of inputs (see `ActivationRules`).
      axis_name: the mapped axis over which batches are spread, if any (`jax.pmap`).
      one_range_a_weight: whether several products of one weight have one range; else each its own.
        All of them must lie in scans over the same layers, or none.
      partly: whether `f` may run a part of the network alone, as one of its methods does. Then
        rules may match nothing, and ranges of products that there are not stay as they are.

    Returns:
      `(params, *inputs, ranges, alpha=1.0, measure=False) -> (outputs, ranges)`. `ranges` are those
      of `initial_ranges` or of an earlier call; they come back as they are unless `measure` is set,
      a Python bool: `jax.jit(quantized, static_argnames="measure")`. An input whose range was never
      measured is left as it is. One of float8 is quantized as float32, and its levels are rounded
      to float8 again. It raises a ValueError: rules that do not fit the products (see
      `Rules.assign`); a product that a rule quantizes, but whose operands cannot be replaced;
      ranges of other products; an alpha outside [0, 1].

      On several devices a range is that of all, within `jax.shard_map` too, and what is quantized
      is quantized by it. In a `cond` or `while` through which they may go differently they first
      measure each for itself, while their inputs are quantized by the range from before, and meet
      after it: in the largest maximum, or the mean percentile of those that came by, the largest
      `cut` of one of them and the most of `not_finite`. Layers of which each device has its own
      within a `shard_map`, such as stages of a pipeline or experts, share one range too: they are
      one product of the mapped function.
    """

    def quantized(
        params: Any,
        *inputs: Any,
        ranges: Mapping[str, Range],
        alpha: ArrayLike = 1.0,
        measure: bool = False,
        **others: Any,
    ) -> tuple[Any, Ranges]:
        if others:
            raise TypeError(
                f"quantize_inputs knows the keywords ranges, alpha and measure, not "
                f"{sorted(others)}. Give the function its own ones first: "
                f"quantize_inputs(functools.partial(f, {next(iter(others))}=...), rules)."
            )
        check_alpha(alpha, " of the inputs")
        by_input: dict[str, Any] = {}
        start: dict[str, InPass] = {}  # made as soon as the products are known

        def along(axes: frozenset[str]) -> tuple[str, ...]:
            names = {axis_name if name == AROUND else name for name in axes}
            return tuple(sorted(name for name in names if name))

        def parted(address: str, found: InPass, parting: Parting) -> InPass:
            axes = along(parting.axes)
            return found.parted(axes) if measure and axes else found

        def met(address: str, found: InPass, parting: Parting) -> InPass:
            axes, quantizer = along(parting.axes), by_input[address]
            if not (measure and axes):
                return found
            found = found.met(axes, is_mean=quantizer.percentile is not None)
            return found if along(parting.before) else found.ranged(quantizer.momentum)

        def chosen(products: Sequence[Product]) -> list[Product]:
            listed = _addressed(products, one_range_a_weight)
            by_input.update(_quantizers(listed, rules, partly))
            _check_ranges(ranges, by_input, listed, partly)
            for address, found in ranges.items():
                quantizer: Any = by_input.get(address)
                cuts = measure and _has_range(quantizer) and not quantizer.signed
                start[address] = InPass.of(found.limit, found.cut if cuts else None)
            return [p for p in listed if any(by_input.get(a) for a in addresses_with_rules(p))]

        def handler(product: Product, side: int, x: Array, found: Any) -> tuple[Array, Any]:
            quantizer = by_input[product.inputs[side]]
            if quantizer is None:
                return x, None
            if x.dtype.itemsize < 2:  # float8: JAX computes with none, but turns them into others
                seen, found = handler(product, side, x.astype(jnp.float32), found)
                return seen.astype(x.dtype), found
            if isinstance(quantizer, TokenQuantizer):
                return quantizer(x, product.contracted[side], alpha), None
            if not measure:
                return quantizer(x, _limit(quantizer, found), alpha), found
            axes = (*([axis_name] if axis_name else []), *product.mesh_axes)
            apart = along(product.apart)
            axes = tuple(axis for axis in axes if axis not in apart)
            return _measured_and_quantized(quantizer, x, found, alpha, axes, bool(apart))

        evaluated = intercept(f, handler, chosen=chosen, parted=parted, met=met)
        outputs, state = evaluated(start, params, *inputs)
        if not measure:
            return outputs, dict(ranges)
        return outputs, {
            path: state[path].ended(found) if path in by_input else found
            for path, found in ranges.items()
        }

    return quantized


def initial_ranges(
    f: Callable[..., Any],
    rules: ActivationRules,
    params: Any,
    *inputs: Any,
    one_range_a_weight: bool = False,
) -> Ranges:
    """Ranges of the inputs that the rules quantize, none measured yet; fixed ones as they are.

    Args:
      f, rules, one_range_a_weight: as for `quantize_inputs`.
      params, *inputs: arrays or `jax.ShapeDtypeStruct`; nothing is computed.

    Raises:
      ValueError: rules that do not fit the products.
    """
    products = _addressed(find_products(f, params, *inputs), one_range_a_weight)
    by_input = _quantizers(products, rules)
    return {
        address: Range.of(by_input[address].limit or 0.0, product.stack)
        for product in products
        for address in product.inputs.values()
        if _has_range(by_input[address])
    }


def measure_ranges(
    f: Callable[..., Any],
    rules: ActivationRules,
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    one_range_a_weight: bool = False,
) -> Ranges:
    """Ranges measured on some batches, of a network that is trained already.

    Args:
      f, rules, one_range_a_weight: as for `quantize_inputs`.
      params: of `f`.
      batches: the further arguments of `f`, a tuple each. The ranges are the largest of maxima and
        the mean of percentiles over them, measured while no input is quantized.

    Raises:
      ValueError: rules that do not fit the products; no batch; an input that was never finite.

    Warns:
      CutOffWarning: see `check_ranges`.
    """

    @functools.cache
    def program(flags: Flags) -> Callable[..., tuple[Any, Ranges]]:
        whole = quantize_inputs(flags.held(f), rules, one_range_a_weight=one_range_a_weight)
        return jax.jit(whole, static_argnames="measure")

    measured: list[Ranges] = []
    for inputs in batches:
        start = initial_ranges(f, rules, params, *inputs, one_range_a_weight=one_range_a_weight)
        arrays, flags = without_flags(inputs)
        _, found = program(flags)(params, *arrays, ranges=start, alpha=0.0, measure=True)
        measured.append(found)
    if not measured:
        raise ValueError("There is no batch to measure ranges on.")
    ranges = {address: _of_batches(address, rules, measured) for address in measured[0]}
    check_ranges(ranges)
    return ranges


def _of_batches(address: str, rules: ActivationRules, measured: Sequence[Ranges]) -> Range:
    """The mean of percentiles, but the largest of maxima."""
    found = jax.tree.map(lambda *of_batch: jnp.stack(of_batch), *(m[address] for m in measured))
    is_mean = rules.of(address).percentile is not None
    limit = jnp.mean(found.limit, axis=0) if is_mean else jnp.max(found.limit, axis=0)
    return Range(limit, jnp.max(found.cut, axis=0), jnp.sum(found.not_finite, axis=0))


def check_ranges(ranges: Mapping[str, Range], *, tolerance: float = 0.001) -> None:
    """Look at ranges after a pass that measured: not inside a compiled function.

    Args:
      ranges: of `quantize_inputs`.
      tolerance: the share of an input's magnitudes that may lie below an unsigned range.

    Raises:
      ValueError: an input whose range was never measured; names its address.

    Warns:
      CutOffWarning: an unsigned range cuts off more; names the address and the share.
    """
    for address, found in ranges.items():
        if not np.all(np.asarray(found.limit) > 0):
            raise ValueError(
                f"The range of the input of {address} is {found.limit}: it was never measured, or "
                f"all that was seen were zeros, or numbers that are not finite. Call the function "
                f"with measure=True on data."
            )
        cut = float(np.max(np.asarray(found.cut)))
        if cut > tolerance:
            warnings.warn(
                f"The unsigned range of the input of {address} cuts off {cut:.1%} of it, which is "
                f"negative. Give it a quantizer with signed=True.",
                CutOffWarning,
                stacklevel=2,
            )


# Compiled apart, so that it is traced once for all inputs of one shape.
@functools.partial(jax.jit, static_argnames=("quantizer", "axes", "apart"))
def _measured_and_quantized(
    quantizer: ActivationQuantizer,
    x: Array,
    found: InPass,
    alpha: ArrayLike,
    axes: tuple[str, ...],
    apart: bool,
) -> tuple[Array, InPass]:
    """An input by the range after one more measurement, and that range."""
    after = _measured(quantizer, x, found, axes)
    # Devices that went ways of their own share the range from before.
    found = after._replace(limit=found.limit) if apart else after
    return quantizer.blended(x, _limit(quantizer, found), alpha), found


def _measured(
    quantizer: ActivationQuantizer, x: Array, found: InPass, axes: tuple[str, ...]
) -> InPass:
    """The range after one more measurement; a fixed one stays, but is seen to cut off."""
    if x.size == 0:  # as JAX makes them itself, in an associative scan
        return found
    measured, cut = quantizer.measure_with_cut(x, axes)
    if quantizer.limit is not None:  # measured all the same: to see whether it is finite
        measured = lax.select(lax.is_finite(measured), np.float32(quantizer.limit), measured)
        return found.after(measured, 0.0, cut)
    return found.after(measured, quantizer.momentum, cut)


def _limit(quantizer: ActivationQuantizer, found: InPass) -> ArrayLike:
    """The end of the range in force."""
    return found.limit if quantizer.limit is None else quantizer.limit


def _has_range(quantizer: Any) -> bool:
    return isinstance(quantizer, ActivationQuantizer)


def _addressed(products: Sequence[Product], one_range_a_weight: bool) -> Sequence[Product]:
    if not one_range_a_weight:
        return products
    listed = [product.without_count() if product.weight else product for product in products]
    first: dict[str, Product] = {}
    for product in listed:
        other = first.setdefault(product.address, product)
        if product.inputs and other.inputs and product.stack != other.stack:
            raise ValueError(
                f"The uses of {product.address} cannot have one range: {other} has one for each of "
                f"the layers {list(other.stack)} of the scans around it, {product} for "
                f"{list(product.stack)}. Leave one_range_a_weight out."
            )
    return listed


def _quantizers(
    products: Sequence[Product], rules: ActivationRules, partly: bool = False
) -> dict[str, Any]:
    """The quantizer, or None, of each input."""
    addresses = list(
        dict.fromkeys(a for product in products for a in addresses_with_rules(product))
    )
    if not addresses and not partly:
        raise ValueError(
            "The function has no product whose inputs could be quantized: none of its inputs "
            "meets a parameter in a matrix product or a convolution."
        )
    if not partly:
        rules.assign(addresses)
    found = {address: rules.of(address) for address in addresses}
    for product in products:
        if product.opaque and any(found[a] for a in addresses_with_rules(product)):
            refuse_opaque(product)
    return found


def _check_ranges(
    ranges: Mapping[str, Range],
    by_input: Mapping[str, Any],
    products: Sequence[Product],
    partly: bool,
) -> None:
    measured = {address for address, quantizer in by_input.items() if _has_range(quantizer)}
    for product in products:
        for address in measured.intersection(product.inputs.values()) & ranges.keys():
            if jnp.shape(ranges[address].limit) != product.stack:
                raise ValueError(
                    f"The range of the input of {address} has the shape "
                    f"{jnp.shape(ranges[address].limit)}, not {product.stack}, that of the layers "
                    f"that have it. Make ranges by initial_ranges, of the same function and rules."
                )
    for address in sorted(measured - ranges.keys() if partly else measured ^ ranges.keys()):
        what = (
            f"There is no range for the input of {address}"
            if address in measured
            else f"There is a range for the input of {address}, to which no rule gives one"
        )
        raise ValueError(
            f"{what}. Make them by ab_jax.products.initial_ranges, of the same function and rules."
        )
