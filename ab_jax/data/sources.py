"""Image files in a directory or an archive, laid out as `split/class/file`.

One wrapping directory or several may stand before the split, and files may lie deeper than the
class: the first part of a path that names a split decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from ab_jax.data.pixels import decode

SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
SUFFIXES = (".jpg", ".jpeg", ".png")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, ".zip")


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


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a source holds.

    Attributes:
      counts: number of images by split and class, classes sorted by name.
      ignored: paths that are no image files of a split.
    """

    counts: dict[str, dict[str, int]]
    ignored: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the training split, sorted by name."""
        return tuple(self.counts["train"])


def check_source(source: Path) -> None:
    """Checks that a source can be opened, before any work.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: it is neither a directory nor an archive of a known kind.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"no such file or directory: {source}; --source is a directory with split/class/file "
            f"in it, or an archive of one"
        )
    if not source.is_dir() and not source.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(
            f"{source} is neither a directory nor an archive ({', '.join(ARCHIVE_SUFFIXES)})"
        )


def read_images(source: Path, split: str) -> Iterator[tuple[ImageFile, bytes]]:
    """Reads every image file of one split, in the source's own order.

    Raises:
      FileNotFoundError, ValueError: as `check_source`, or the archive is damaged.
    """
    for _, file, read in _files(source):
        if file is not None and file.split == split:
            yield file, read()


def entries(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields for each file of a source its path, and a function that reads it.

    The function is to be called before the next file is asked for, if at all.

    Raises:
      FileNotFoundError, ValueError: as `check_source`, or the archive is damaged.
    """
    check_source(source)
    if source.is_dir():
        return _directory(source)
    return _zip(source) if source.name.lower().endswith(".zip") else _tar(source)


def scan(source: Path) -> Contents:
    """Reads a whole source once: decodes every image and counts them.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: the archive or an image is damaged, two files have one name, there is no training
        split or neither of the others, or a split's classes are not those of the training split.
        The message names the file, the split or the class.
    """
    counts: dict[str, dict[str, int]] = {}
    ignored: list[str] = []
    seen: set[str] = set()
    for path, file, read in _files(source):
        if file is None:
            ignored.append(path)
            continue
        if file.name in seen:
            raise ValueError(f"{source} holds two files {file.name}")
        seen.add(file.name)
        decode(read(), f"{path} in {source}")
        classes = counts.setdefault(file.split, {})
        classes[file.class_name] = classes.get(file.class_name, 0) + 1
    counts = {split: dict(sorted(classes.items())) for split, classes in counts.items()}
    _check_splits(source, counts)
    return Contents(counts, tuple(ignored))


def _check_splits(source: Path, counts: dict[str, dict[str, int]]) -> None:
    if "train" not in counts or len(counts) < 2:
        raise ValueError(
            f"{source} must hold train/class/file and test/class/file (or val, validation) with "
            f"files that end in {', '.join(SUFFIXES)}; "
            f"found {' and '.join(sorted(counts)) or 'no such file'}"
        )
    for split, classes in counts.items():
        if odd := sorted(set(classes) ^ set(counts["train"])):
            raise ValueError(
                f"{source}: train and {split} must have the same classes, "
                f"but {odd[0]} is in only one of them ({len(odd)} such classes)"
            )


def _image_file(path: str) -> ImageFile | None:
    """The image file at `path`; None if it is hidden, in no split, or no JPEG or PNG by name."""
    parts = PurePosixPath(path).parts
    if parts[-1].startswith(".") or not parts[-1].lower().endswith(SUFFIXES):
        return None
    for depth, part in enumerate(parts[:-2]):
        if part in SPLITS:
            name = "/".join((SPLITS[part], *parts[depth + 1 :]))
            return ImageFile(SPLITS[part], parts[depth + 1], name)
    return None


def _files(source: Path) -> Iterator[tuple[str, ImageFile | None, Callable[[], bytes]]]:
    """Yields for each file its path, what it is, and a function that reads it."""
    for path, read in entries(source):
        yield path, _image_file(path), read


def _directory(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for directory, subdirectories, names in os.walk(source, followlinks=True):
        subdirectories.sort()
        for name in sorted(names):
            path = Path(directory, name)
            yield path.relative_to(source).as_posix(), path.read_bytes


def _zip(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with _damage_named(source), zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield (
                    member.filename,
                    _damage_named(source)(functools.partial(archive.read, member)),
                )


def _tar(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with _damage_named(source), tarfile.open(source) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                with file:
                    yield member.name, _damage_named(source)(file.read)
        # At a header that is cut off or damaged tarfile stops as if the archive ended there, so
        # look for the block of zeros that is the end of a whole one.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends, or is unreadable, before the end-of-archive mark")
        while archive.fileobj.read(1 << 20):
            pass  # a compressed file's checksum stands at its end


@contextlib.contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    """Turns what the archive modules raise over a damaged file into an error that names it."""
    try:
        yield
    except (
        *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError),
        OSError,  # gzip and bz2
    ) as error:
        raise ValueError(f"{source} is a damaged archive: {error}") from error
