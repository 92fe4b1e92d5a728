"""Inputs of a function that are no arrays, such as `True` or `"same"`: it is traced with them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Flags:
    """What of a function's inputs is no array. Equal ones have equal hashes.

    Attributes:
      structure: of the inputs as a tree; None: there are no flags, and `f` stays as it is.
      values: for each leaf whether it is a flag, and if so which.
    """

    structure: Any = None
    values: tuple[tuple[bool, Any], ...] = ()

    def held(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f` as a function of its parameters and of what `without_flags` leaves of the inputs."""
        if self.structure is None:
            return f

        def with_flags(params: Any, *arrays: Any) -> Any:
            left = iter(arrays)
            leaves = [value if is_flag else next(left) for is_flag, value in self.values]
            return f(params, *jax.tree.unflatten(self.structure, leaves))

        return with_flags


def without_flags(inputs: Sequence[Any]) -> tuple[tuple[Any, ...], Flags]:
    """Inputs without the flags among them, and the flags.

    Flags are Python's bools, strings and whatever else is neither a number nor an array.
    """
    leaves, structure = jax.tree.flatten(tuple(inputs))
    if not any(map(_is_flag, leaves)):
        return tuple(inputs), Flags()
    values = tuple((True, leaf) if _is_flag(leaf) else (False, None) for leaf in leaves)
    return tuple(leaf for leaf in leaves if not _is_flag(leaf)), Flags(structure, values)


def _is_flag(leaf: Any) -> bool:
    if isinstance(
        leaf, bool | np.bool_ | type
    ):  # classes of numbers have shapes and dtypes to give
        return True
    is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return not (
        is_array or hasattr(leaf, "__jax_array__") or isinstance(leaf, int | float | complex)
    )
