"""Rules that say which inputs of products are quantized, and how."""

import dataclasses
import re
from typing import ClassVar

from ab_jax.activations import ActivationQuantizer, TokenQuantizer
from ab_jax.products.product import Product
from ab_jax.rules import Rules

_KERNEL = "/kernel"


@dataclasses.dataclass(frozen=True, init=False)
class ActivationRules(Rules):
    """Which quantizer the input of a product gets: the first rule that matches its whole address.

    An address is the path of the weight that enters (`block1/conv2/kernel`), or
    `attention/product/query` where two activations meet; `describe_products` lists them. A pattern
    may also leave out what tells several uses apart (`#1`), or operands (`/query`), or both, and
    the `/kernel` of a Flax layer: `block1/conv2`.
    """

    quantizer_type: ClassVar[tuple[type, ...]] = (ActivationQuantizer, TokenQuantizer)
    noun: ClassVar[str] = "layer"

    def _names(self, path: str) -> list[str]:
        operand = re.fullmatch(r"((.*/)?product(#\d+)?)/[^/]+", path)
        names = [path, operand[1]] if operand else [path]
        names += [base for name in names if (base := re.sub(r"#\d+", "", name)) != name]
        # Layers are what rules spoke of before they spoke of products.
        if not operand:
            last = names[-1]
            names.append(last.removesuffix(_KERNEL) if last.endswith(_KERNEL) else last + _KERNEL)
        return names


def addresses_with_rules(product: Product) -> list[str]:
    """What rules have to say something about: inputs, also those that cannot be quantized."""
    if product.opaque and product.kind in ("weight", "activation"):
        return [product.address]
    return list(product.inputs.values())
