"""The path of each leaf of a tree, which rule decides it, and whether its quantizer can take it."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from ab_jax.quantizers import Quantizer
from ab_jax.rules import Rules


def assigned(params: Any, rules: Rules) -> tuple[list[tuple[str, Any]], list[int], Any]:
    """The leaves with their paths, the index of each one's rule, and the tree's structure.

    Raises:
      ValueError: as `leaves_by_path` and `Rules.assign`.
    """
    leaves = leaves_by_path(params)
    return leaves, rules.assign([path for path, _ in leaves]), jax.tree.structure(params)


def leaves_by_path(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False
) -> list[tuple[str, Any]]:
    """The leaves in the order of the tree, each with its path.

    A path is the keys, attributes and indices joined by `/`, without the attribute `value` of a
    Flax box: an NNX Variable (or the metadata that Linen puts around a parameter). A key, a field
    or a parameter that is itself called `value` stays.

    Args:
      tree: any tree.
      is_leaf: what to take as a leaf beside what JAX does, as in `jax.tree.flatten`.

    Raises:
      ValueError: two leaves have one path; names it.
    """
    leaves: dict[str, Any] = {}
    nodes = jax.tree.leaves_with_path(tree, is_leaf=lambda node: is_leaf(node) or _is_box(node))
    for keys, node in nodes:
        for inner, leaf in jax.tree.leaves_with_path(node, is_leaf=is_leaf):
            if inner[:1] == (GetAttrKey("value"),) and _is_box(node):
                inner = inner[1:]
            path = keystr((*keys, *inner), simple=True, separator="/")
            if path in leaves:
                raise ValueError(
                    f"The path {path!r} is that of two leaves, and no rule or scale could tell "
                    f"them apart. Rename a key of one of them."
                )
            leaves[path] = leaf
    return list(leaves.items())


def _is_box(node: Any) -> bool:
    """Whether Flax put it around a parameter; by name, since the core does not load Flax."""
    return any(
        base.__module__.startswith("flax.") and base.__name__ in ("Variable", "AxisMetadata")
        for base in type(node).__mro__
    )


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
        quantizer.check(leaf.shape, dtype)
    except ValueError as error:
        raise ValueError(f"Rule {pattern!r}, parameter {path}: {error}") from None
