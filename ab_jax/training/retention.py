"""Which checkpoints of a directory are to be trusted, which are kept, and when the others go.

A checkpoint is a directory named by its step, and is trusted for its manifest. It is written under
another name (`STEP.writing`, and what Orbax makes of it) and gets its own when it has its manifest,
so that a process which is killed leaves no half of one. It holds its step too, so that another name
does not make it another checkpoint. Damaged ones are set aside as `STEP.damaged` when their step is
written again.
"""

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ab_jax.files import read_regular, write_whole
from ab_jax.training.seals import NAME as MANIFEST
from ab_jax.training.seals import find_damage, write_manifest

_ABOUT = "about.json"
_WRITING = ".writing"
_STEP = r"(?:0|[1-9][0-9]{0,17})"  # as a checkpoint is named: 0012, say, is none


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is passed over, since a file of it is not as it was written."""


class NoWholeCheckpointError(ValueError):
    """There are checkpoints, and all of them are damaged."""


def newest_whole(directory: Path) -> int | None:
    """The step of the newest checkpoint that is as it was written; None if there is none at all.

    Warns:
      DamagedCheckpointWarning: a newer one is damaged, or its writing was cut off; names the file.

    Raises:
      NoWholeCheckpointError: all are damaged; names the files and what to delete.
    """
    damages: list[str] = []
    for step in _steps(directory):
        path = directory / str(step)
        damage = find_damage(path) or _find_another_step(path)
        if damage is None:
            _warn(directory, step, damages)
            return step
        damages.append(damage)
    if damages:
        hint = ""
        if any(damage.endswith(f"{MANIFEST} is missing") for damage in damages):
            hint = (
                " Whole ones that older code wrote without a manifest get theirs by python -m "
                "ab_jax.training.seals PATH."
            )
        raise NoWholeCheckpointError(
            f"There are checkpoints in {directory}, but none is whole: {'; '.join(damages)}. Put "
            f"the right files back, or delete {directory} to begin anew.{hint}"
        )
    _warn(directory, None, [])
    return None


def written(path: Path) -> Path:
    """Where a checkpoint lies that is being written."""
    return path.with_name(f"{path.name}{_WRITING}")


def seal(path: Path, accuracy: float | None) -> None:
    """Make what has been written of a checkpoint one that is trusted.

    Args:
      path: what its directory is to be. A damaged one of that name is set aside.
      accuracy: on the validation part, 0 to 1, by which the best is known.

    Raises:
      OSError: it cannot be written; names the path and the fix.
    """
    about = {"accuracy": accuracy, "step": int(path.name)}
    write_whole(written(path) / _ABOUT, json.dumps(about).encode())
    write_manifest(written(path))
    if path.exists():
        names = (f"{path.name}.damaged{i or ''}" for i in itertools.count())
        path.rename(next(path.with_name(n) for n in names if not path.with_name(n).exists()))
    written(path).rename(path)


def remove_replaced(directory: Path, newest: int, keep: int) -> None:
    """Remove what whole checkpoints replace.

    What is newer stays. It is damaged, or the run would have gone on from it; it goes when a whole
    one has passed its step.

    Args:
      directory: of the checkpoints.
      newest: step of a whole one.
      keep: how many to keep, up to that one. The most accurate is kept beside them.
    """
    sealed = [
        s for s in _steps(directory) if s <= newest and (directory / f"{s}" / MANIFEST).is_file()
    ]
    best = max(sealed, key=lambda step: (_accuracy(directory / str(step)), step))
    kept = {str(step) for step in (*sealed[:keep], best)}
    for path in list(directory.iterdir()):
        found = re.match(rf"({_STEP})(\..+)?$", path.name)
        ours = found and path.is_dir() and not path.is_symlink()
        if ours and found and int(found[1]) <= newest and path.name not in kept:
            if (path / MANIFEST).is_file():  # goes first: half of it is no checkpoint
                (path / MANIFEST).unlink()
            shutil.rmtree(path)


def _steps(directory: Path) -> list[int]:
    """Of all that are checkpoints by name, newest first."""
    names = [path.name for path in _entries(directory)]
    return sorted((int(name) for name in names if re.fullmatch(_STEP, name)), reverse=True)


def _entries(directory: Path) -> Iterator[Path]:
    return directory.iterdir() if directory.is_dir() else iter(())


def _warn(directory: Path, chosen: int | None, damages: list[str]) -> None:
    """Tell of what is newer than the checkpoint that was chosen."""
    cut_off = [
        f"the writing of {path} was cut off"
        for path in _entries(directory)
        if (found := re.match(rf"({_STEP}){re.escape(_WRITING)}", path.name))
        and int(found[1]) > (chosen or 0)
    ]
    damages = damages + [
        f"{path} has no checkpoint's name, which is a step such as {int(path.name)}"
        for path in _entries(directory)
        if path.name.isdecimal()
        and not re.fullmatch(_STEP, path.name)
        and int(path.name) > (chosen or 0)
    ]
    instead = "There is none before it" if chosen is None else f"That of step {chosen} is used"
    for damage in (*damages, *cut_off):
        text = f"Damaged checkpoint: {damage}. {instead}."
        warnings.warn(text, DamagedCheckpointWarning, stacklevel=3)


def _about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where that cannot be read."""
    try:
        about = json.loads(read_regular(path / _ABOUT) or b"")
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _accuracy(path: Path) -> float:
    """Less than any where it was not read."""
    accuracy = _about(path).get("accuracy")
    return float(accuracy) if isinstance(accuracy, int | float) and accuracy >= 0 else -1.0


def _find_another_step(path: Path) -> str | None:
    """Whether a whole checkpoint has the name of another step. (Older code noted none.)"""
    step = _about(path).get("step", int(path.name))
    return (
        None
        if step == int(path.name)
        else f"{path} is that of step {step}, whose name it must have"
    )
