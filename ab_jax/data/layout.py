"""What a path says: `split/class/file`, anywhere below the source.

One wrapping directory or several may stand before the split, and files may lie deeper than the
class: the first part of a path that names a split decides. Paths are those below the source, their
parts joined by `/`.
"""

from __future__ import annotations

import dataclasses
import enum
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
