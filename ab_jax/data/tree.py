"""Directories and links, on disk and in the contents of an archive, walked alike.

So an archive holds the same images as the directory that it was made from.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import os
import stat
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from ab_jax.data.layout import LeftOut, place, shown
from ab_jax.data.limits import check_bytes

File = TypeVar("File")  # whatever reads one
Read = Callable[[], bytes]
_MOST_HOPS = 40  # from link to link, as Linux has it


class Directory(abc.ABC, Generic[File]):
    """A directory of either kind."""

    @property
    @abc.abstractmethod
    def identity(self) -> Hashable:
        """The same for two paths that lead to one directory."""

    @abc.abstractmethod
    def children(self) -> Iterator[tuple[str, bool, Directory[File] | File | LeftOut]]:
        """Yields names, whether they are links, and what is there; sorted by name."""


def walk(root: Directory[File]) -> Iterator[tuple[str, File | LeftOut]]:
    """Yields the path of every file below a directory, with the file, or why it is left out.

    Links to files count as files. Links to directories are followed after all that is not linked,
    and no directory is read twice in one place: within a class, within a split, or outside.
    So links cannot lead in circles, nor count an image a second time.
    """
    visited = set()
    waiting, linked = deque([("", root)]), deque[tuple[str, Directory[File]]]()
    while waiting or linked:
        path, directory = (waiting or linked).popleft()
        visit = directory.identity, place(path)
        if visit in visited:
            yield path, LeftOut.TWICE
            continue
        visited.add(visit)
        for name, is_link, child in directory.children():
            below = f"{path}/{name}" if path else name
            if not isinstance(child, Directory):
                yield below, child
            elif is_link and place(below) == "hidden":
                yield below, LeftOut.HIDDEN
            else:
                (linked if is_link else waiting).append((below, child))


@dataclasses.dataclass(frozen=True)
class DiskDirectory(Directory[Read]):
    """A directory on disk.

    Attributes:
      path: where it lies, or a link to it.
      source: what it is part of, for errors.
    """

    path: str
    source: Path

    @property
    def identity(self) -> Hashable:
        """Device and number."""
        status = os.stat(self.path)
        return status.st_dev, status.st_ino

    def children(self) -> Iterator[tuple[str, bool, DiskDirectory | Read | LeftOut]]:
        """See `Directory`; nothing is opened, since a FIFO or a device might block."""
        with os.scandir(self.path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            yield entry.name, entry.is_symlink(), self._child(entry)

    def _child(self, entry: os.DirEntry[str]) -> DiskDirectory | Read | LeftOut:
        try:
            status = entry.stat()  # of what a link leads to
        except OSError:
            return LeftOut.NOWHERE
        if stat.S_ISDIR(status.st_mode):
            return DiskDirectory(entry.path, self.source)
        if stat.S_ISREG(status.st_mode):
            return functools.partial(_read, entry.path, status.st_size, self.source)
        return LeftOut.IRREGULAR


def _read(path: str, size: int, source: Path) -> bytes:
    check_bytes(size, f"{shown(os.path.relpath(path, source))} in {source}")
    with open(path, "rb") as file:
        return file.read(size)  # not to the end, which some files of the system lack


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link in an archive, or a hard one, whose target counts from the archive's root."""

    target: str
    hard: bool = False


# By name a file, a `Link`, or the `Nodes` of a directory.
Nodes: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ArchiveDirectory(Directory[File]):
    """A directory in an archive's contents, which know no other files than the archive's."""

    nodes: Nodes
    trail: tuple[Nodes, ...] = ()  # from the root to the directory above

    @property
    def identity(self) -> Hashable:
        """That of the table, of which there is one a directory."""
        return id(self.nodes)

    def children(self) -> Iterator[tuple[str, bool, ArchiveDirectory[File] | File | LeftOut]]:
        """See `Directory`."""
        trail = (*self.trail, self.nodes)
        for name, node in sorted(self.nodes.items()):
            yield name, isinstance(node, Link), _follow(trail, [name])


def contents(items: Iterable[tuple[str, Any]]) -> ArchiveDirectory[Any]:
    """The root of an archive's contents, from paths and what is there; the last of a path counts.

    Args:
      items: an empty dictionary stands for a directory, and those that lead to a path need none.
    """
    root: Nodes = {}
    for path, node in items:
        *parents, name = path.split("/")
        nodes = root
        for parent in parents:
            below = nodes.get(parent)
            if not isinstance(below, dict):
                below = nodes[parent] = {}
            nodes = below
        if node != {} or not isinstance(nodes.get(name), dict):
            nodes[name] = node
    return ArchiveDirectory(root)


def _follow(trail: tuple[Nodes, ...], parts: list[str]) -> Any:
    """Where a path leads from the last directory of a trail, through all links on the way."""
    waiting = parts[::-1]
    hops = 0
    while waiting:
        part = waiting.pop()
        if part in ("", "."):
            continue
        if part == "..":
            trail = trail[:-1]
            if not trail:
                return LeftOut.NOWHERE
            continue
        node = trail[-1].get(part)
        while isinstance(node, Link) and node.hard:  # shares what is there, a link too
            hops += 1
            node = _at(trail[0], node.target) if hops <= _MOST_HOPS else None
        if isinstance(node, Link):
            hops += 1
            if hops > _MOST_HOPS or node.target[:1] in ("", "/"):
                return LeftOut.NOWHERE
            waiting += node.target.split("/")[::-1]
        elif isinstance(node, dict):
            trail = (*trail, node)
        elif node is None or waiting:
            return LeftOut.NOWHERE
        else:
            return node
    return ArchiveDirectory(trail[-1], trail[:-1])


def _at(root: Nodes, path: str) -> Any:
    node: Any = root
    for part in path.split("/"):
        node = node.get(part) if isinstance(node, dict) else None
    return node
