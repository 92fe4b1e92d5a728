"""What a path says, `split/class/file` anywhere below the source, and names fit to be shown.

One wrapping directory or several may stand before the split, and files may lie deeper than the
class: the first part of a path that names a split decides. Paths are those below the source, their
parts joined by `/`.
"""

from __future__ import annotations

import dataclasses
import enum
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What macOS puts into zip files, Synology beside images, and Windows on drives.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One image file of a source.

    Attributes:
      split: `"train"`, `"validation"` or `"test"`.
      class_name: name of its class directory.
      name: its path from the split on, such as `"train/cat/0001.jpg"`.
    """

    split: str
    class_name: str
    name: str


class LeftOut(enum.Enum):
    """Why a path of a source counts as no image; the value goes into a sentence."""

    NO_IMAGE = "no PNG, JPEG, WebP or BMP in split/class/"
    HIDDEN = "hidden, or made by an operating system"
    UPWARDS = "paths with .. in them"
    NOWHERE = "links that lead nowhere, or out of the archive"
    TWICE = "directories that are linked to and read elsewhere"
    IRREGULAR = "no regular files"


def image_file(path: str) -> ImageFile | LeftOut:
    """The image file at `path`, by its name alone."""
    parts = path.split("/")
    if ".." in parts:
        return LeftOut.UPWARDS
    if is_hidden(path):
        return LeftOut.HIDDEN
    if parts[-1].lower().endswith(SUFFIXES):
        for depth, part in enumerate(parts[:-2]):
            if part in SPLITS:
                name = "/".join((SPLITS[part], *parts[depth + 1 :]))
                return ImageFile(SPLITS[part], parts[depth + 1], name)
    return LeftOut.NO_IMAGE


def is_hidden(path: str) -> bool:
    """Whether a part of a path begins with a dot, as `.git` and `.ipynb_checkpoints` do."""
    return any(part.startswith(".") or part in _OF_SYSTEMS for part in path.split("/"))


def place(directory: str) -> Literal["hidden", "outside", "split", "class"]:
    """What files in a directory are: hidden, outside of all splits, or of a split or a class."""
    if is_hidden(directory):
        return "hidden"
    parts = directory.split("/")
    for depth, part in enumerate(parts):
        if part in SPLITS:
            return "class" if depth + 1 < len(parts) else "split"
    return "outside"


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
