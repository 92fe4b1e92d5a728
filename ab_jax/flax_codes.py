"""Codes in Flax's state dicts, and so in `flax.serialization.to_bytes`, `from_bytes` and msgpack.

    from ab_jax import linen                    # or nnx: either makes codes known to Flax

    data = flax.serialization.to_bytes(codes)   # codes of ab_jax.quantize, alone or in any tree
    like = jax.eval_shape(lambda: ab_jax.quantize(params, rules))
    codes = flax.serialization.from_bytes(like, data)

The state of a `Quantized` or `BinaryCoded` are its arrays: `codes`, `scale` and, where there are
zero points, `zero_point`. Width and dtype are no arrays; as Flax has it, the target gives them.
This is also what Orbax gives back where it is given no target.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from ab_jax.quantized import BinaryCoded, Quantized

_PARTS = ("codes", "scale", "zero_point")


def register() -> None:
    """Make codes known to Flax. Importing `ab_jax.linen` or `ab_jax.nnx` does it, too."""
    for kind in (Quantized, BinaryCoded):
        serialization.register_serialization_state(kind, to_state, from_state, override=True)


def to_state(codes: Quantized) -> dict[str, Any]:
    """The arrays by name: what `flax.serialization.to_state_dict` gives of codes."""
    return {name: part for name in _PARTS if (part := getattr(codes, name)) is not None}


def from_state(target: Quantized, state: dict[str, Any]) -> Quantized:
    """The codes of a state: what `flax.serialization.from_state_dict` gives for a target of codes.

    Args:
      target: of the same quantizer and shape; arrays or `jax.ShapeDtypeStruct`.
      state: as `to_state` makes it; None for `zero_point` is as good as none.

    Raises:
      ValueError: parts that are missing, of another shape or dtype, or codes of more bits; names
        the place in the tree.
    """
    name = serialization.current_path()
    again = "Give a target that the same rules quantize, such as the codes that were saved."
    if not isinstance(state, dict):
        raise ValueError(f"{name} has codes in the target, but a {type(state).__name__} is given.")
    wanted, given = to_state(target), {k: v for k, v in state.items() if v is not None}
    if wanted.keys() != given.keys():
        raise ValueError(
            f"{name} has {', '.join(sorted(given))} where the target has "
            f"{', '.join(sorted(wanted))}. {again}"
        )
    for part, like in wanted.items():
        found = given[part]
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"The {part} of {name} would be {found.dtype}{list(found.shape)}, where the target "
                f"has {like.dtype}{list(like.shape)}. {again}"
            )
    most = 2 ** (target.bits if isinstance(target, BinaryCoded) else target.bits - 1)
    if _known(given["codes"]) and np.abs(np.asarray(given["codes"], np.int32)).max() > most:
        raise ValueError(f"{name} has codes of more than the target's {target.bits} bits. {again}")
    parts: dict[str, Any] = {part: jnp.asarray(array) for part, array in given.items()}
    return dataclasses.replace(target, **parts)


def _known(array: Any) -> bool:
    """Whether the numbers are at hand: neither traced nor with other processes."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
