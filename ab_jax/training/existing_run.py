"""What a run's directory holds already: a run that was begun, and perhaps who has its lock.

`RunDirectory` asks before it writes there, and whoever starts many runs before it starts one.
"""

import errno
import fcntl
import json
import os
import platform
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ab_jax.files import read_regular, writing


def stored_run(path: Path) -> dict[str, Any] | None:
    """What a run's directory says of it: its record, or the description of one to be resumed.

    None where a run may begin anew: nothing is there, or what stopped before its first checkpoint.

    Raises:
      ValueError: the file is damaged; names it.
    """
    file = path / "record.json"
    if not file.exists():
        metrics = path / "metrics.jsonl"
        has_metrics = metrics.exists() and metrics.stat().st_size > 0
        if not (has_metrics or has_checkpoints(path)):
            return None
        file = path / "config.json"
    try:
        data = read_regular(file)
        if data is None:
            return None
        stored = json.loads(data)
        if not isinstance(stored, dict) or not isinstance(stored.get("config", {}), dict):
            raise ValueError("it holds no flags")
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}). Remove {path} to run it anew.") from None
    return stored


def differences(
    was: Mapping[str, Any],
    is_: Mapping[str, Any],
    free: Collection[str] = (),
    added: Mapping[str, Any] | None = None,
) -> list[str]:
    """Each flag in which a run differs from what it was begun with: `--epochs was 4, is 8`.

    Args:
      was: the flags that are stored.
      is_: those of now, as a run records them.
      free: flags that may differ.
      added: as for `changes_between`.
    """
    asked = json.loads(json.dumps(dict(is_)))
    return told(changes_between({"config": was}, {"config": asked}, free, added))


def is_in_use(path: Path) -> bool:
    """Whether a process runs in a run's directory."""
    try:
        lock = os.open(path / "lock", os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks there
        return False
    finally:
        os.close(lock)
    return False


def has_checkpoints(path: Path) -> bool:
    """Whether a run can be resumed there."""
    return any((path / "checkpoints").glob("[0-9]*"))


def changes_between(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Collection[str],
    added: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Each flag, and each fact of the data, in which a run differs from what it was begun with.

    A fact that the code did not note yet when the run was begun tells nothing.

    Args:
      before, now: with `config`, the flags, and `data`.
      free: flags that may differ.
      added: flags that a run begun by older code lacks, with what that code did.
    """
    changes = []
    for of in ("config", "data"):
        if of in before and of in now:
            was, is_ = before[of], now[of]
            if of == "config":
                was = {**{n: x for n, x in (added or {}).items() if n in is_}, **was}
            names = {*was, *is_}.difference(free) if of == "config" else was
            for name in sorted(names):
                if was.get(name) != is_.get(name):
                    change = {"of": of, "name": name, "was": was.get(name), "is": is_.get(name)}
                    changes.append(change)
    return changes


def told(changes: list[dict[str, Any]]) -> list[str]:
    """The changes in words: `--epochs was 4, is 8`."""
    prefix = {"config": "--", "data": "data "}
    return [  # of a thousand names of classes, the first ones
        f"{prefix[c['of']]}{c['name']} was {c['was']!r:.200}, is {c['is']!r:.200}" for c in changes
    ]


_HOLDER = b"process "  # how the file begins, which says who holds the lock


def take_lock(path: Path) -> int:
    """Take a directory for this process, until it closes what is returned or ends in any way.

    Args:
      path: the file `lock` of that directory, created when missing.

    Raises:
      BlockingIOError: another process holds it.
      ValueError: what lies there is no lock, but a link or another file.
      OSError: it cannot be written.
    """
    # A link would have another file overwritten, and a pipe would be waited for.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        lock = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock(path) from None
        with writing(path.parent):
            raise
    try:
        holder = os.pread(lock, 200, 0) if stat.S_ISREG(os.fstat(lock).st_mode) else b"none"
        if holder and not holder.startswith(_HOLDER):
            raise _no_lock(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            named = f" ({holder.decode(errors='replace').strip()})" if holder else ""
            raise BlockingIOError(
                f"The run {path.parent} is in use by another process{named}. Wait for it or end "
                f"it, or choose another --name."
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(
                f"warning: {path.parent} cannot be locked ({error.strerror}): run one process "
                f"there alone."
            )
        with writing(path.parent):
            os.ftruncate(lock, 0)
            os.pwrite(lock, _HOLDER + f"{os.getpid()} on {platform.node()}\n".encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _no_lock(path: Path) -> ValueError:
    return ValueError(f"{path} is no lock, but a link or another file. Remove it.")
