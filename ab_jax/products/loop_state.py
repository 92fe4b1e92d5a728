"""State that goes through loops and branches: what it may become there, and what is split."""

from typing import Any

import jax
import jax.numpy as jnp

from ab_jax.products.product import Product

State = dict[str, Any]


def check_kept(product: Product, address: str, old: Any, new: Any) -> None:
    """Refuse an entry that a loop or a branch could not hand on.

    Args:
      product: whose handler made it.
      address, old, new: of the entry; `old` is None where there was none.

    Raises:
      ValueError: there was none, or it had another structure, shape or dtype.
    """
    if old is None:
        raise ValueError(
            f"The handler makes an entry of the state at {address}, where there was none before: "
            f"{product} lies in a cond, while or scan, which hand on entries, but make none. Give "
            f"one in the state that goes in."
        )
    was, makes = jax.tree.map(jax.typeof, (old, new))
    before, after = map(jax.tree.leaves, (was, makes))
    structure: Any = jax.tree.structure(was)
    same = structure == jax.tree.structure(makes) and all(
        one.shape == other.shape
        and (one.dtype == other.dtype or one.weak_type or other.weak_type)  # JAX casts these
        for one, other in zip(before, after, strict=True)
    )
    if not same:
        raise ValueError(
            f"The handler makes {makes} of the entry of the state at {address}, which is {was}: "
            f"{product} lies in a cond, while or scan, where entries keep structure, shape and "
            f"dtype."
        )


def check_layers(state: State, length: int) -> None:
    """Refuse entries that a scan over so many layers could not hand out.

    Raises:
      ValueError: one without an axis of that length in front.
    """
    for address, entry in state.items():
        for leaf in jax.tree.leaves(entry):
            if jnp.shape(leaf)[:1] != (length,):
                raise ValueError(
                    f"The entry of the state at {address} holds an array of shape "
                    f"{list(jnp.shape(leaf))}: in a scan over layers it needs an axis in "
                    f"front for these, of length {length}."
                )


def split(state: State, stacked: set[str]) -> tuple[State, State]:
    """What a loop carries, and what it hands out slice by slice."""
    inside = {address: entry for address, entry in state.items() if address in stacked}
    return {a: entry for a, entry in state.items() if a not in stacked}, inside
