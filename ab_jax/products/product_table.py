"""What rules make of the products of a function, as a table.

    print(describe_products(forward, params, images, rules=rules, input_rules=input_rules))

A row for each product: its operands, the quantizers of its weight and of its inputs, the line of
the model. Beside it stands what speaks against the rules: scales along other axes than the channels
that the product has, inputs that no rule sees or can see. Quantized parameters that enter no
product at all, such as norms, are told too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.describe import table
from ab_jax.products.finding import traced
from ab_jax.products.input_rules import ActivationRules, addresses_with_rules
from ab_jax.products.product import Product
from ab_jax.products.ranges import Range
from ab_jax.quantizers import Quantizer
from ab_jax.rules import Rules, assigned, check_fits


@dataclasses.dataclass(frozen=True)
class DescribedProduct:
    """A product and what the rules do to it.

    Attributes:
      product: itself.
      weight: the quantizer of its weight, if there are rules and one quantizes it.
      inputs: the quantizers of its inputs by address, if there are rules for them.
      notes: what speaks against the rules.
    """

    product: Product
    weight: Quantizer | None
    inputs: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ProductDescription:
    """A row for each product. `print` shows it as a table.

    Attributes:
      rows: in the order of the program.
      lookups: parameters of which the inputs pick entries, as of an embedding, with the lines.
      elsewhere: quantized parameters that enter no product and no look-up.
    """

    rows: tuple[DescribedProduct, ...]
    lookups: Mapping[str, str]
    elsewhere: tuple[str, ...]

    def __str__(self) -> str:
        products = [row.product for row in self.rows]
        columns = {
            "product": [product.address for product in products],
            "operands": [_operands(product) for product in products],
            "weight": [_weight(row) for row in self.rows],
            "inputs": [_inputs(row) for row in self.rows],
            "line": [product.where.rpartition("/")[2] for product in products],
            "": ["; ".join(row.notes) for row in self.rows],
        }
        lines = [table({head: cells for head, cells in columns.items() if any(cells)})]
        lines += [f"{path} is looked up ({where})" for path, where in self.lookups.items()]
        lines += [f"{path} is quantized, but enters no product" for path in self.elsewhere]
        return "\n".join(lines)


def describe_products(
    f: Callable[..., Any],
    params: Any,
    *inputs: Any,
    rules: Rules | None = None,
    input_rules: ActivationRules | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> ProductDescription:
    """The products of `f(params, *inputs)` and what the rules do to them; nothing is computed.

    Args:
      f, params, *inputs: as for `find_products`.
      rules: of the parameters (`ab_jax.blend`), if any.
      input_rules: of the inputs (`quantize_inputs`), if any.
      ranges: measured ones, to see what unsigned ones cut off; not of a traced function.

    Raises:
      ValueError: rules that do not fit the parameters, or the products.
    """
    function = traced(f, params, *inputs)
    quantizers: dict[str, Quantizer] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if rules is not None:
        leaves, chosen, _ = assigned(params, rules)
        for (path, leaf), index in zip(leaves, chosen, strict=True):
            pattern, quantizer = rules.rules[index]
            if quantizer is not None:
                check_fits(path, leaf, pattern, quantizer)
                quantizers[path], shapes[path] = quantizer, leaf.shape
    by_input = {}
    if input_rules is not None:
        addresses = [a for product in function.products for a in addresses_with_rules(product)]
        input_rules.assign(addresses)
        by_input = {address: input_rules.of(address) for address in addresses}
    rows = []
    for product in function.products:
        weight = quantizers.get(product.weight or "")
        of_inputs = {a: by_input[a] for a in addresses_with_rules(product) if a in by_input}
        notes = [
            *_axes(product, weight, shapes.get(product.weight or "")),
            *_unseen(product, of_inputs),
            *_cut(of_inputs, ranges or {}),
        ]
        rows.append(DescribedProduct(product, weight, of_inputs, tuple(notes)))
    used = {product.weight for product in function.products} | function.lookups.keys()
    elsewhere = tuple(path for path in quantizers if path not in used)
    return ProductDescription(tuple(rows), function.lookups, elsewhere)


def _axes(product: Product, weight: Quantizer | None, shape: tuple[int, ...] | None) -> list[str]:
    """Whether the scales of a weight lie along the axes that its product keeps."""
    if weight is None or shape is None or product.channel_axes is None or weight.axis is None:
        return []
    axes = (weight.axis,) if isinstance(weight.axis, int) else weight.axis
    own = {axis % len(shape) for axis in axes}
    channels = {axis for axis in product.channel_axes if shape[axis] > 1}
    if own == channels or not channels:
        return []
    proposed = tuple(sorted(channels))
    return [f"its channels are axis={proposed if len(proposed) > 1 else proposed[0]}"]


def _unseen(product: Product, of_inputs: Mapping[str, Any]) -> list[str]:
    if product.opaque is not None:
        return [f"in the body of a {product.opaque}: its inputs cannot be quantized"]
    if product.kind == "constant":
        return ["with a constant: its input stays as it is"]
    if product.kind == "parameter":
        return ["of parameters alone"]
    return []


def _cut(of_inputs: Mapping[str, Any], ranges: Mapping[str, Range]) -> list[str]:
    notes = []
    for address in of_inputs:
        if address in ranges:
            cut = float(np.max(np.asarray(ranges[address].cut)))
            notes += [f"cuts off {cut:.1%} of {address}"] if cut > 0 else []
    return notes


def _operands(product: Product) -> str:
    """Their shapes; of a mark with those of the product behind it, however that reshapes it."""
    shapes = product.shapes if product.followed_by is None else product.followed_by.shapes
    return " x ".join(map(_shape, shapes))


def _shape(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _weight(row: DescribedProduct) -> str:
    if row.weight is None:
        return ""
    return f"{type(row.weight).__name__} {row.weight.bits}"


def _inputs(row: DescribedProduct) -> str:
    if len(row.inputs) < 2:
        return "".join(map(_input, row.inputs.values()))
    told = [(address.rpartition("/")[2], _input(q)) for address, q in row.inputs.items()]
    return ", ".join(f"{operand}: {quantizer}" for operand, quantizer in told)


def _input(quantizer: Any) -> str:
    match quantizer:
        case ActivationQuantizer(bits=bits, signed=signed, limit=limit):
            sign = "" if signed else " unsigned"
            return f"{bits} bits{sign}{'' if limit is None else f' to {limit:g}'}"
        case TokenQuantizer(bits=bits):
            return f"{bits} bits a token"
    return "as it is"
