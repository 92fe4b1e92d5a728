"""Rules: which quantizer belongs to which path; the first that matches it whole decides."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

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
    quantizer_type: ClassVar[type] = Quantizer
    noun: ClassVar[str] = "parameter"

    rules: tuple[tuple[str, Any], ...]

    def __init__(self, rules: Iterable[tuple[str, Any]]) -> None:
        object.__setattr__(self, "rules", tuple(self._checked(rule) for rule in rules))

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
        return [i for i, (pattern, _) in enumerate(self.rules) if re.fullmatch(pattern, path)]

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
        raise TypeError(
            f"A rule is a pair of a regular expression and a {self.quantizer_type.__name__} (or "
            f"None), not {rule!r}. Write {type(self).__name__}([(PATTERN, QUANTIZER), "
            f'(".*", None)]).'
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
