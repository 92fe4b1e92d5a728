"""ImageNet's 1,000 classes: their WordNet ids, whose sorted order numbers them, and names.

A name is the first word that WordNet 3.0 has for the id (Copyright 2006 by Princeton University,
whose license lets it be copied with this notice); where two have the same, the id follows.
"""

import functools
from pathlib import Path

COUNT = 1000
_LINES = Path(__file__).with_suffix(".txt")


@functools.cache
def class_ids() -> tuple[str, ...]:
    """The ids by label: the logits of networks trained on ImageNet come in this order."""
    return tuple(line.partition(" ")[0] for line in _lines())


def class_names() -> tuple[str, ...]:
    """What the classes are called, by label: all different."""
    return tuple(line.partition(" ")[2] for line in _lines())


def class_index(name: str) -> int | None:
    """The label, 0 to 999, of a class named by its WordNet id or by its index.

    Args:
      name: such as `"n01440764"`, or `"0"` or `"000"`.

    Returns:
      None: it is neither.
    """
    if name.isascii() and name.isdecimal():
        return int(name) if len(name) <= 4 and int(name) < COUNT else None
    return _labels().get(name)


@functools.cache
def _lines() -> list[str]:
    return _LINES.read_text(encoding="ascii").splitlines()


@functools.cache
def _labels() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(class_ids())}
