"""Files that appear whole or not at all, and errors over them that a reader can act on."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_FIXES = {
    errno.ENOSPC: "Free space on that disk",
    errno.EDQUOT: "Free space within your quota",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another disk",
    errno.EROFS: "Make it writable, or choose another directory",
    errno.EACCES: "Make it writable, or choose another directory",
    errno.EPERM: "Make it writable, or choose another directory",
}


def read_regular(path: Path) -> bytes | None:
    """The bytes of a regular file, also behind a link; None where there is nothing.

    Raises:
      ValueError: it is something else, a pipe say, which could not be read to an end.
      OSError: it cannot be read.
    """
    try:
        # A pipe without a writer would otherwise be waited for here.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is no regular file. Remove what is there.")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write so that `path` is at any time absent, the old file, or the whole new one.

    Also after a power cut: the bytes are on the disk before the name is.

    Raises:
      OSError: it cannot be written; names the path and the fix. The old file is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line that is on the disk when this returns; a cut leaves one without its end.

    Raises:
      OSError: as `write_whole`.
    """
    with writing(path), path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[str]:
    """The lines of a file that have their end; none of a file that is not there.

    Bytes that are no UTF-8 become surrogates, which `encode(errors="surrogateescape")` turns back.

    Raises:
      ValueError, OSError: as `read_regular`.
    """
    data = read_regular(path) or b""
    return data.decode(errors="surrogateescape").split("\n")[:-1]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names the file and the fix."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        fix = _FIXES.get(error.errno or 0, "Mend that")
        clear = type(error)(
            f"{path} cannot be written: {reason}. {fix}, then give the same command again."
        )
        clear.errno = error.errno
        raise clear from error


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems do not know how
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
