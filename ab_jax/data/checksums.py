"""A list of what a prepared data set consists of, by which changed bytes are noticed.

It is written once, when everything else is there. Small files are hashed at every reading, which
takes a millisecond. Of large ones the size is compared, and the rest when they are read as a whole;
beyond that the format of the records has hashes of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ab_jax.files import write_whole

NAME = "checksums.json"
_SMALL = 1 << 20  # bytes


def write_checksums(directory: Path) -> None:
    """Writes `checksums.json`: size in bytes and SHA-256 of every file of a directory, by name.

    Raises:
      OSError: a file cannot be read, or the list not be written; names it.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != NAME)
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    write_whole(directory / NAME, json.dumps(listed, indent=1).encode())


def damage(directory: Path, *, whole: str | None = None) -> str | None:
    """What is not as it was when the list was written.

    Args:
      directory: of a prepared data set.
      whole: which large files to hash too: those with this in their name.

    Returns:
      One file and what is wrong with it; None if nothing is, or if there is no list, as in data
      sets that were prepared without.

    Raises:
      OSError: a file is there but cannot be read.
    """
    if not (directory / NAME).exists():
        return None
    try:
        listed = json.loads((directory / NAME).read_bytes())
        expected = [(name, int(of["bytes"]), str(of["sha256"])) for name, of in listed.items()]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, IsADirectoryError):
        return f"{NAME} is unreadable"
    for name, size, digest in expected:
        path = directory / name
        if not path.is_file():
            return f"{name!r} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size} as when it was prepared"
        read_whole = size <= _SMALL or (whole is not None and whole in name)
        if read_whole and _sha256(path) != digest:
            return f"{name} has other bytes than when it was prepared"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
