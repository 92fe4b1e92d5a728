"""The files of tar and zip archives, read where they lie: nothing is unpacked.

An archive may be damaged, or made to do harm. Whatever it claims, memory is taken for one file of
at most `limits.MOST_BYTES` at a time, and for names.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ab_jax.data.layout import LeftOut, shown
from ab_jax.data.limits import check_bytes
from ab_jax.data.tree import Link, Nodes, Read, contents, walk

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, ".zip")
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_MOST_OF_HEADERS = 2**20  # bytes before one file; extended headers hold long names and attributes
_MOST_PIECES = 2**16  # of sparse files, all together
_MOST_OF_XZ = 2**29  # bytes for its dictionary; xz -9 makes one of 2**26
_MOST_OF_A_NAME = 4096  # bytes of a path, as Linux has it
_AT_ONCE = 4096  # bytes; of a zip file's bzip2 and LZMA, zipfile unpacks all that it reads at once


class ArchiveError(ValueError):
    """An archive that is damaged, or holds what cannot be read; the message names it."""


Files = Iterator[tuple[str, Read | LeftOut]]


def archive_files(source: Path) -> Files:
    """Yields the path of every file, with a function that reads it, or why it is left out.

    The function is to be called before the next file is asked for, if at all. Links come last, and
    count as `tree.walk` counts them.

    Args:
      source: a file whose name ends in one of `ARCHIVE_SUFFIXES`.

    Raises:
      OSError: the archive cannot be opened.
      ValueError: it is damaged; or, from the function, a file is too large or cannot be unpacked.
    """
    with open(source, "rb") as file:
        if source.name.lower().endswith(".zip"):
            yield from _zip_files(source, file)
        else:
            yield from _tar_files(source, file)


def _path(name: str) -> str:
    """A member's path below the root; empty for the root itself."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _links(nodes: Nodes) -> list[tuple[str, Any]]:
    """What the links of an archive add to the files that it holds: see `tree.walk`."""
    if not any(isinstance(node, Link) for node in nodes.values()):
        return []
    within = ((p, node) for p, node in nodes.items() if p and ".." not in p.split("/"))
    return [
        (path, found)
        for path, found in walk(contents(within))
        if isinstance(nodes.get(path), Link | None)
    ]


@contextlib.contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    """Turns what the archive modules raise over a damaged file into an error that names it."""
    try:
        yield
    except ArchiveError:
        raise
    except NotImplementedError as error:  # such as Deflate64
        raise ArchiveError(
            f"{source} cannot be unpacked here ({error}): unpack it, and name the directory"
        ) from error
    except (
        *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, struct.error),
        *(OSError, ValueError, IndexError, OverflowError, RuntimeError),  # over odd headers
    ) as error:
        raise ArchiveError(f"{source} is a damaged archive: {shown(str(error))}") from error


# tar


class _Allowance:
    """A file that gives out what it is asked for up to a limit, which its reader sets anew.

    `tarfile` reads headers whole, of any size: long names, attributes, tables of sparse files.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = _MOST_OF_HEADERS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"its headers claim {size:,} bytes")
        self.left -= size
        return self._file.read(size)


def _tar_files(source: Path, file: IO[bytes]) -> Files:
    start = file.read(_AT_ONCE)
    file.seek(0)
    opener = next((_OPENERS[magic] for magic in _OPENERS if start.startswith(magic)), None)
    nodes: Nodes = {}
    with _damage_named(source), contextlib.ExitStack() as stack:
        if opener is lzma.open:  # says in its first bytes how much memory it wants
            lzma.LZMADecompressor(memlimit=_MOST_OF_XZ).decompress(start, max_length=1)
        unpacked: IO[bytes] = stack.enter_context(opener(file)) if opener else file  # type: ignore[operator]
        allowance = _Allowance(unpacked)
        archive = stack.enter_context(tarfile.open(fileobj=allowance, mode="r:"))  # type: ignore[call-overload]
        read = functools.partial(_read_tar, source, archive, allowance)
        for member in _members(archive, allowance):
            path = _path(member.name)
            if member.isdir() and path:
                nodes.setdefault(path, {})
            elif path and (member.issym() or member.islnk()):
                target = _path(member.linkname) if member.islnk() else member.linkname
                nodes[path] = Link(target, hard=member.islnk())
            elif member.isfile() and path:
                nodes[path] = member
                yield path, functools.partial(read, member)
            elif not member.isdir():
                nodes[path] = LeftOut.IRREGULAR
                yield path or ".", LeftOut.IRREGULAR
        # At a header that is cut off or damaged tarfile stops as if the archive ended there, so
        # look for the block of zeros that is the end of a whole one.
        unpacked.seek(archive.offset)
        if unpacked.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends, or is unreadable, before the end-of-archive mark")
        while unpacked.read(1 << 20):
            pass  # a compressed file's checksum stands at its end
        found = _links(nodes)
        # In their order, for a compressed file is unpacked anew to go back in it.
        for path, linked in sorted(found, key=lambda item: getattr(item[1], "offset", -1)):
            yield path, linked if isinstance(linked, LeftOut) else functools.partial(read, linked)


def _members(archive: tarfile.TarFile, allowance: _Allowance) -> Iterator[tarfile.TarInfo]:
    """The headers, one after another; of those that are gone, nothing is kept."""
    offset, pieces = -1, 0
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        archive.pax_headers, member.pax_headers = {}, {}
        if len(member.name) > _MOST_OF_A_NAME or len(member.linkname) > _MOST_OF_A_NAME:
            raise tarfile.ReadError(f"a name in it has more than {_MOST_OF_A_NAME} characters")
        if member.size < 0 or archive.offset <= offset:
            raise tarfile.ReadError("a header in it leads backwards")
        table: Any = member.sparse
        pieces += len(table or ())
        if pieces > _MOST_PIECES:
            raise tarfile.ReadError(f"its sparse files have more than {_MOST_PIECES:,} pieces")
        offset = archive.offset
        yield member
        allowance.left = _MOST_OF_HEADERS


def _read_tar(
    source: Path, archive: tarfile.TarFile, allowance: _Allowance, member: tarfile.TarInfo
) -> bytes:
    check_bytes(member.size, f"{shown(_path(member.name))} in {source}")
    allowance.left = member.size
    with _damage_named(source):
        end = 0
        table: Any = member.sparse
        for offset, size in table or ():
            if not end <= offset <= offset + size <= member.size:
                raise tarfile.ReadError("its table of a sparse file makes no sense")
            end = offset + size
        file = archive.extractfile(member)
        assert file is not None, "a regular file"
        with file:
            return file.read()


# zip


def _zip_files(source: Path, file: IO[bytes]) -> Files:
    nodes: Nodes = {}
    with _damage_named(source), _opened_zip(file) as archive:
        read = functools.partial(_read_zip, source, archive)
        for member in archive.infolist():
            path = _path(member.filename)
            mode = member.external_attr >> 16  # of Unix; 0 where another system wrote it
            if member.filename.endswith("/"):
                if path:
                    nodes.setdefault(path, {})
            elif path and stat.S_ISLNK(mode) and member.file_size <= _MOST_OF_A_NAME:
                nodes[path] = Link(read(member).decode(errors="surrogateescape"))
            elif path and stat.S_IFMT(mode) in (0, stat.S_IFREG):
                nodes[path] = member
                yield path, functools.partial(read, member)
            else:
                nodes[path] = LeftOut.IRREGULAR
                yield path or ".", LeftOut.IRREGULAR
        for path, found in _links(nodes):
            yield path, found if isinstance(found, LeftOut) else functools.partial(read, found)


def _opened_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """Opens a zip file whose names may be UTF-8 without saying so, as macOS and Info-ZIP write."""
    try:
        return zipfile.ZipFile(file, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(file)  # in code page 437, as the format has it


def _read_zip(source: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    name = f"{shown(member.filename)} in {source}"
    check_bytes(member.file_size, name)
    if member.flag_bits & 1:
        raise ArchiveError(f"{name} is encrypted: unpack the archive, and name the directory")
    with _damage_named(source), archive.open(member) as packed:
        return b"".join(iter(lambda: packed.read(_AT_ONCE), b""))
