"""Image files in a directory or an archive, laid out as `split/class/file` (see `layout`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from ab_jax.data.archives import ARCHIVE_SUFFIXES, Files, archive_files
from ab_jax.data.bad_images import BadImages
from ab_jax.data.layout import (
    SUFFIXES,
    ImageFile,
    LeftOut,
    check_class_names,
    check_utf8,
    image_file,
    shown,
)
from ab_jax.data.pixels import decode
from ab_jax.data.tree import DiskDirectory, Read, walk


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a source holds.

    Attributes:
      counts: number of images by split and class, classes sorted by name.
      ignored: paths that are no image files of a split, and why they are left out.
      bad: images that cannot be read, by name (as `ImageFile` has it), and why; not in `counts`.
    """

    counts: dict[str, dict[str, int]]
    ignored: Mapping[str, LeftOut]
    bad: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the training split, sorted by name."""
        return tuple(self.counts["train"])


def check_source(source: Path) -> None:
    """Checks that a source can be opened, before any work.

    Raises:
      FileNotFoundError: there is nothing at `source`.
      ValueError: it is neither a directory nor an archive of a known kind, or no regular file.
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
    if not source.is_dir() and not source.is_file():
        raise ValueError(f"{source} is neither a directory nor a regular file")


def read_images(source: Path, split: str) -> Iterator[tuple[ImageFile, bytes]]:
    """Reads every image file of one split, in the source's own order.

    Raises:
      FileNotFoundError, ValueError: as `check_source`, or the archive is damaged.
    """
    for _, file, read in _files(source):
        if isinstance(file, ImageFile) and file.split == split:
            yield file, read()


def entries(source: Path) -> Files:
    """Yields the path of each file of a source, with a function that reads it.

    The function is to be called before the next file is asked for, if at all. In its place stands a
    `LeftOut` for what is no file that can be read: FIFOs and devices, links that lead nowhere,
    directories that are linked to a second time.

    Raises:
      OSError: as `check_source`, or something cannot be opened.
      ValueError: as `check_source`, or the archive is damaged; or, from the function, a file has
        more than `limits.MOST_BYTES`, is encrypted, or cannot be unpacked.
    """
    check_source(source)
    if source.is_dir():
        return walk(DiskDirectory(str(source), source))
    return archive_files(source)


def scan(source: Path, *, skip_bad: bool = False, way_out: str = "") -> Contents:
    """Reads a whole source once: decodes every image and counts them.

    Args:
      source: a directory or an archive.
      skip_bad: whether to leave out images that cannot be read.
      way_out: what else to advise where there are such.

    Raises:
      OSError: there is nothing at `source`, or something in it cannot be opened.
      ValueError: the archive or an image is damaged or too large (see `limits`), two files have one
        name, a name is unfit (see `names`), there is no training split or neither of the others, or
        a split's classes are not those of the training split. The message names the file, the split
        or the class; of damaged images the first 20.
    """
    counts: dict[str, dict[str, int]] = {}
    ignored: dict[str, LeftOut] = {}
    seen: set[str] = set()
    bad = BadImages()
    for path, file, read in _files(source):
        if isinstance(file, LeftOut):
            ignored[path] = file
            continue
        if file.name in seen:
            raise ValueError(f"{source} holds two files {shown(file.name)}")
        seen.add(file.name)
        encoded = read()
        with bad.noted(file.name):
            decode(encoded, f"{shown(path)} in {source}")
            classes = counts.setdefault(file.split, {})
            classes[file.class_name] = classes.get(file.class_name, 0) + 1
    if not skip_bad:
        bad.refuse(way_out)
    counts = {split: dict(sorted(classes.items())) for split, classes in counts.items()}
    check_class_names((name for classes in counts.values() for name in classes), source)
    try:
        _check_splits(source, counts)
    except ValueError as error:  # what was left out may be what is missed
        told = [str(error), *left_out(source, ignored)]
        if bad.reasons:
            first = shown(next(iter(bad.reasons)))
            told.append(f"{len(bad.reasons)} images cannot be read, such as {first}")
        raise ValueError("; ".join(told)) from error
    return Contents(counts, ignored, bad.reasons)


def left_out(source: Path, ignored: Mapping[str, LeftOut]) -> Iterator[str]:
    """Yields what to say of files that are left out: for each reason how many, and one of them."""
    for reason, count in Counter(ignored.values()).items():
        example = next(path for path in ignored if ignored[path] is reason)
        yield (f"{count} files of {source} are left out ({reason.value}), such as {shown(example)}")


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
                f"but {shown(odd[0])} is in only one of them ({len(odd)} such classes)"
            )


def _files(source: Path) -> Iterator[tuple[str, ImageFile | LeftOut, Read]]:
    """Yields for each file its path, what it is, and a function that reads it."""
    for path, read in entries(source):
        file = image_file(path)
        if isinstance(read, LeftOut):
            yield path, file if file is LeftOut.HIDDEN else read, bytes
            continue
        if isinstance(file, ImageFile):
            check_utf8(path, source)
        yield path, file, read
