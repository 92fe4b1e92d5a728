"""Which rule decides each leaf of a tree, and whether its quantizer can take the leaf."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from ab_jax.quantizers import Quantizer
from ab_jax.rules import Rules


def assigned(params: Any, rules: Rules) -> tuple[list[tuple[str, Any]], list[int], Any]:
    """The leaves with their paths, the index of each one's rule, and the tree's structure."""
    with_keys, structure = jax.tree.flatten_with_path(params)
    leaves = [(path_of(keys), leaf) for keys, leaf in with_keys]
    return leaves, rules.assign([path for path, _ in leaves]), structure


def path_of(keys: Any) -> str:
    """A leaf's keys, attributes and indices joined by `/`, without a trailing `/value` (NNX)."""
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


def check_fits(path: str, leaf: Any, pattern: str, quantizer: Quantizer) -> None:
    """Refuse a leaf that the quantizer of its rule cannot take."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"Rule {pattern!r} gives {path} the quantizer {quantizer}, but it is "
            f"{'no array' if dtype is None else dtype}, not floating point. Add the rule "
            f"({re.escape(path)!r}, None) before it."
        )
    try:
        quantizer.scale_shape(leaf.shape)
    except ValueError as error:
        raise ValueError(f"Rule {pattern!r}, parameter {path}: {error}") from None
