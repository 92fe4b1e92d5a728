"""Rules: which quantizer belongs to which path; the first that matches it whole decides.

A path is that of a leaf of the tree; `leaves_by_path` says how it is made.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from ab_jax.quantizers import Quantizer


@dataclasses.dataclass(frozen=True, init=False)
class Rules:
    """Which quantizer a parameter gets: the first rule whose pattern matches its whole path.

    Hashable, so that it can be a static argument of a jitted function.

    Args:
      rules: pairs of a regular expression, which must match a whole path, and a quantizer, or None
        to leave the parameter as it is.

    Raises:
      ValueError: a pattern that is no regular expression. TypeError: a rule that is no such pair.
    """

    # What a rule gives, and what a path leads to; other kinds of rules have others.
    quantizer_type: ClassVar[type | tuple[type, ...]] = Quantizer
    noun: ClassVar[str] = "parameter"

    rules: tuple[tuple[str, Any], ...]

    def __init__(self, rules: Iterable[tuple[str, Any]]) -> None:
        given: Any = rules
        if not isinstance(given, Iterable):
            given = [given]  # which is no pair
        object.__setattr__(self, "rules", tuple(self._checked(rule) for rule in given))

    def of(self, path: str) -> Any:
        """The quantizer (or None) of one path.

        Raises:
          ValueError: no rule covers it.
        """
        found = self._matching(path)
        if not found:
            raise self._uncovered([path])
        return self.rules[found[0]][1]

    def assign(self, paths: Sequence[str]) -> list[int]:
        """The index of the rule that decides each path.

        Raises:
          ValueError: no paths at all; a path that no rule covers; a rule that decides no path,
            unless it matches them all (a catch-all with nothing left to catch).
        """
        if not paths:
            raise ValueError(f"There are no {self.noun}s: the tree has no leaves.")
        matches = [self._matching(path) for path in paths]
        uncovered = [path for path, found in zip(paths, matches, strict=True) if not found]
        if uncovered:
            raise self._uncovered(uncovered)
        chosen = [found[0] for found in matches]
        for i, (pattern, _) in enumerate(self.rules):
            matched = [found for found in matches if i in found]
            if i in chosen or (matched and len(matched) == len(paths)):
                continue
            if matched:
                earlier = sorted({self.rules[found[0]][0] for found in matched})
                raise ValueError(
                    f"Rule {pattern!r} decides no {self.noun}: all it matches is decided by the "
                    f"earlier {_listed([repr(p) for p in earlier])}. Move it further up, or remove "
                    f"it."
                )
            raise ValueError(
                f"Rule {pattern!r} matches no {self.noun}. Patterns must match a whole path; the "
                f"paths are {_listed(paths)}."
            )
        return chosen

    def _matching(self, path: str) -> list[int]:
        names = self._names(path)
        return [
            i
            for i, (pattern, _) in enumerate(self.rules)
            if any(re.fullmatch(pattern, name) for name in names)
        ]

    def _names(self, path: str) -> list[str]:
        """What a pattern may match to mean this path."""
        return [path]

    def _uncovered(self, paths: Sequence[str]) -> ValueError:
        return ValueError(
            f"No rule covers {_listed(paths)}. Add a rule for it, or end the rules with "
            f'(".*", None) to leave the rest as it is.'
        )

    def _checked(self, rule: Any) -> tuple[str, Any]:
        match rule:
            case (str() as pattern, quantizer) if quantizer is None or isinstance(
                quantizer, self.quantizer_type
            ):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"Rule pattern {pattern!r} is no regular expression: {error}."
                    ) from None
                return pattern, quantizer
        kinds = self.quantizer_type
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        raise TypeError(
            f"A rule is a pair of a regular expression and a "
            f"{' or '.join(kind.__name__ for kind in kinds)} (or "
            f"None), not {rule!r}. Write {type(self).__name__}([(PATTERN, QUANTIZER), "
            f'(".*", None)]).'
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def assigned(params: Any, rules: Rules) -> tuple[list[tuple[str, Any]], list[int], Any]:
    """The leaves with their paths, the index of each one's rule, and the tree's structure.

    Raises:
      ValueError: as `leaves_by_path` and `Rules.assign`. TypeError: rules that are none.
    """
    if not isinstance(rules, Rules):
        raise TypeError(
            f"rules must be made by ab_jax.Rules, not of type {type(rules).__name__}. Write "
            f'ab_jax.Rules([(PATTERN, QUANTIZER), (".*", None)]).'
        )
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
    nodes = jax.tree.leaves_with_path(tree, is_leaf=lambda node: is_leaf(node) or is_box(node))
    for keys, node in nodes:
        for inner, leaf in jax.tree.leaves_with_path(node, is_leaf=is_leaf):
            if inner[:1] == (GetAttrKey("value"),) and is_box(node):
                inner = inner[1:]
            path = keystr((*keys, *inner), simple=True, separator="/")
            if path in leaves:
                raise ValueError(
                    f"The path {path!r} is that of two leaves, and no rule or scale could tell "
                    f"them apart. Rename a key of one of them."
                )
            leaves[path] = leaf
    return list(leaves.items())


def is_box(node: Any) -> bool:
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
