"""Names of files and classes: fit to be shown on one line, and told apart by whoever reads them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

# Reverse what is written around them, so that a name reads as another.
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
# Control characters, line and paragraph separators, halves of pairs.
_UNFIT = frozenset({"Cc", "Zl", "Zp", "Cs"})


def shown(path: str) -> str:
    """A path for a message: on one line, whatever it holds, all that is invisible escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path
    )


def check_utf8(path: str, source: Path) -> None:
    """Refuses a path that cannot be stored or shown.

    Raises:
      ValueError: it is no UTF-8; on disk any bytes are a name.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: the file name {shown(path)} is no UTF-8; rename the file"
        ) from error


def check_class_names(names: Iterable[str], source: Path) -> None:
    """Refuses class names that a table could not show, or that look like one another.

    They are stored one a line, and blanks around them are lost. `Cat` and `cat` are two classes.

    Raises:
      ValueError: one has a control character or a bidirectional control, begins or ends with a
        blank, or shows nothing; or two differ in no more than the Unicode form (é as one character
        or as two), blanks, or characters that do not show. The message has the names in ASCII.
    """
    known: dict[str, str] = {}
    for name in sorted(set(names)):
        if any(unicodedata.category(c) in _UNFIT or c in _BIDIRECTIONAL for c in name):
            raise ValueError(f"{source}: the class name {name!a} has control characters; rename it")
        visible = "".join(c for c in name if unicodedata.category(c) != "Cf")
        visible = unicodedata.normalize("NFC", " ".join(visible.split()))
        if not visible or name != name.strip():
            raise ValueError(
                f"{source}: the class name {name!a} shows nothing, or begins or ends with a "
                f"blank; rename it"
            )
        if visible in known:
            raise ValueError(
                f"{source}: the class names {known[visible]!a} and {name!a} look the "
                f"same; rename one, or move its files to the other"
            )
        known[visible] = name
