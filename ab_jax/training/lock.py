"""The lock of a run's directory, by which only one process at a time writes there."""

import errno
import fcntl
import os
import platform
import stat
from pathlib import Path

from ab_jax.files import writing

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
