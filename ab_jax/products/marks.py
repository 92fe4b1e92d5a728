"""Inputs that no pass over a jaxpr can see, marked by hand where the function is written.

    x = mark(x, "block0/depthwise/kernel")
    y = pallas_convolution(x, kernel)

A product may have no equation of its own: a depthwise convolution written as multiply-adds, a
Pallas kernel, the body of a custom derivative. Its input is then marked with the address that the
product would have, the path of the weight.
"""

from typing import TypeVar

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_PREFIX = "input of "

Marked = TypeVar("Marked", bound=Array)


def mark(x: Marked, address: str) -> Marked:
    """`x` itself, known to `find_products` as the input of the product at `address`.

    A product that does have an equation, and the same weight, is then not listed once more.

    Args:
      x: an array of floats.
      address: the path of the weight, as rules have it.

    Raises:
      TypeError: an array of other numbers.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"mark takes an input of floats at {address}, not {jnp.result_type(x)}.")
    marked: Marked = checkpoint_name(x, _PREFIX + address)
    return marked


def address_of(name: str) -> str | None:
    """The address that a name of `checkpoint_name` was given by `mark`, if it was."""
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None
