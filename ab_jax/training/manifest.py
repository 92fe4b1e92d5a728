"""The manifest of a checkpoint: a SHA-256 of each of its files, written when all of them are.

Orbax restores a flipped bit without a word, so a checkpoint is trusted for its manifest alone. By
hand:

    cd runs/NAME/checkpoints/STEP && sha256sum --check MANIFEST
    python -m ab_jax.training.manifest PATH     # makes one, for checkpoints that have none yet
"""

import hashlib
import stat
import sys
from pathlib import Path

from ab_jax.files import read_regular, write_whole

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
