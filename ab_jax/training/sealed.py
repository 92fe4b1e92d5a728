"""A file with its SHA-256 beside it, so that no byte of it changes unseen.

    cd runs/NAME && sha256sum --check config.json.sha256

The digest of the new bytes is written first, together with that of the old ones: whatever a process
that is killed leaves there, the file is one that its seal knows.
"""

import hashlib
from pathlib import Path

from ab_jax.files import read_regular, write_whole


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file and its seal; at any time the seal knows what is there.

    Raises:
      OSError: one of them cannot be written; names the path and the fix.
    """
    new, old = _line(path, data), read_regular(path)
    write_whole(_seal(path), new + (b"" if old is None else _line(path, old)))
    write_whole(path, data)
    write_whole(_seal(path), new)


def seal(path: Path) -> None:
    """Seal a file as it is, where older code has written none."""
    data = read_regular(path)
    if data is not None and not _seal(path).exists():
        write_whole(_seal(path), _line(path, data))


def read_sealed(path: Path) -> bytes | None:
    """The bytes of a file, also of one without a seal; None where there is neither.

    Raises:
      ValueError: it is not as it was written, or missing; names it and the way out.
    """
    data = read_regular(path)  # before its seal, which knows it before it is there
    known = read_regular(_seal(path))
    if known is None or (data is not None and _line(path, data) in known.splitlines(True)):
        return data
    what = "is missing" if data is None else "is not as it was written"
    raise ValueError(
        f"{path} {what}. Put it back as it was, or remove {path.parent} to begin anew. (Delete "
        f"{_seal(path)} where the change is meant.)"
    )


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _line(path: Path, data: bytes) -> bytes:
    # As sha256sum writes it.
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()
