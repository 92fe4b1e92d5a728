"""Seals: by its SHA-256 beside it no byte of a file, or of a checkpoint, changes unseen.

    cd runs/NAME && sha256sum --check config.json.sha256
    cd runs/NAME/checkpoints/STEP && sha256sum --check MANIFEST
    python -m ab_jax.training.seals PATH     # makes a manifest, for checkpoints that have none yet

The digest of a file's new bytes is written first, together with that of the old ones: whatever a
process that is killed leaves there, the file is one that its seal knows. The manifest of a
checkpoint is written when all of its files are. Orbax restores a flipped bit without a word, so a
checkpoint is trusted for its manifest alone.
"""

import hashlib
import stat
import sys
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


NAME = "MANIFEST"
_UNREADABLE = "unreadable"


def write_manifest(checkpoint: Path) -> None:
    """Seal a checkpoint, a directory of which every file has been written.

    Raises:
      ValueError: a file there cannot be read; names it.
      OSError: it cannot be written; names the path and the fix.
    """
    digests = _digests(checkpoint)
    for name, digest in digests.items():
        if digest.startswith(_UNREADABLE):
            raise ValueError(f"{checkpoint / name} is {digest}: it is no part of a checkpoint.")
    write_whole(checkpoint / NAME, _to_bytes(digests))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; names the file. None: it is as it was written."""
    manifest = checkpoint / NAME
    if not checkpoint.is_dir():
        return f"{checkpoint} is no directory"
    if not manifest.exists():
        return f"{manifest} is missing"
    try:
        stored, present = read_regular(manifest), _digests(checkpoint)
    except (OSError, ValueError):
        return f"{manifest} is no file that can be read"
    assert stored is not None
    # To the byte: the manifest itself may be what is damaged.
    if stored == _to_bytes(present):
        # Orbax takes a directory for an item, whether anything lies in it or not.
        for entry in sorted(checkpoint.iterdir()):
            if entry.is_dir() and not any(name.startswith(f"{entry.name}/") for name in present):
                return f"{entry} is no part of it"
        return None
    known = _from_bytes(stored)
    if _to_bytes(known) != stored:
        return f"{manifest} is damaged"
    for name in sorted({*known, *present}):
        if name not in present:
            return f"{checkpoint / name} is missing"
        if name not in known:
            return f"{checkpoint / name} is no part of it"
        if known[name] != present[name]:
            return f"{checkpoint / name} is not as it was written"
    return None


def _digests(checkpoint: Path) -> dict[str, str]:
    digests = {}
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if not path.is_dir() and name != NAME:
            digests[name] = _digest(path)
    return digests


def _digest(path: Path) -> str:
    """Of one file; of what cannot be read, why, which no manifest holds."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            return f"{_UNREADABLE} (no regular file)"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{_UNREADABLE} ({error.strerror})"


def _to_bytes(digests: dict[str, str]) -> bytes:
    # As sha256sum writes them.
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def _from_bytes(manifest: bytes) -> dict[str, str]:
    lines = [line.partition("  ") for line in manifest.decode(errors="replace").splitlines()]
    return {name: digest for digest, _, name in lines}


def main(paths: list[str]) -> None:
    """Seal checkpoints by hand, those alone that have no manifest."""
    for path in map(Path, paths):
        if not path.is_dir() or (path / NAME).exists():
            sys.exit(f"error: {path} must be a checkpoint's directory, without a {NAME} in it.")
        try:
            write_manifest(path)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
