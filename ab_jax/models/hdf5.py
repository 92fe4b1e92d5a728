"""As much of HDF5 as Keras writes, read as if whoever wrote it meant harm.

The HDF5 library serves any file: it follows links to other files, loads filters, and over a few
damaged bytes runs for ever or takes all memory. Weights need little of it: groups in groups, and
data sets whose bytes lie in one piece, as HDF5's format 1.8 has them (superblock 0 or 1, object
headers of version 1, symbol tables). Whatever else there is in a file is refused by name. Nothing
is allocated for what a file claims: all that is read of it but the arrays is bounded.

Format: https://docs.hdfgroup.org/archive/support/HDF5/doc/H5.format.html
"""

import dataclasses
import math
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from ab_jax.safetensors_header import MalformedError, Place, is_shape, shown

_BUDGET = 16 * 2**20  # bytes read of all but the arrays; ResNet-152's take some three million
_MAX_NAME = 256  # bytes
_MAX_DEPTH = 16  # of groups within groups
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Messages of an object's header.
_SPACE, _LINKS, _TYPE, _LINK, _EXTERNAL, _LAYOUT, _FILTERS = 1, 2, 3, 6, 7, 8, 11
_ATTRIBUTE, _CONTINUATION, _SYMBOLS = 12, 16, 17
_SHARED = 2  # a flag of a message that stands elsewhere
_SOFT_LINK = 2
_KINDS_OF_LAYOUT = {0: "in its header", 2: "in chunks", 3: "in other data sets"}
# IEEE's floating point: bits, places of exponent and fraction, and the exponent's bias.
_FLOATS = {
    struct.pack(
        "<I2H4BI", size, 0, 8 * size, fraction, 8 * size - 1 - fraction, 0, fraction, bias
    ): (size)
    for size, fraction, bias in ((2, 10, 15), (4, 23, 127), (8, 52, 1023))
}


class File:
    """An open HDF5 file, with how much may still be read of what it says of its arrays.

    Raises:
      MalformedError: it is no HDF5 file, or of a form that Keras does not write.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self._left = _BUDGET
        start = self.read(0, 16, "the superblock")
        if start[:8] != _SIGNATURE:
            raise MalformedError("it is no HDF5 file")
        version, offsets, lengths = start[8], start[13], start[14]
        if version not in (0, 1) or (offsets, lengths) != (8, 8):
            raise MalformedError(
                f"it is HDF5 of a form that Keras does not write (superblock {version}). Load it "
                f"into its model in Keras and write that by model.save('name.h5')"
            )
        addresses = self.read(24 + 4 * version, 48, "the superblock")
        base, _, _, driver, _, root = struct.unpack("<6Q", addresses)
        if base != 0 or driver != 2**64 - 1:
            raise MalformedError("it is a part of a larger HDF5 file")
        self.root = Item(self, (), root)

    def read(self, begin: int, count: int, what: str) -> bytes:
        """Some bytes, which the file has."""
        if begin + count > self.size:
            raise MalformedError(f"{what} lies beyond its end, as of a file that was cut off")
        self._left -= count
        if self._left < 0:
            raise MalformedError(f"it says more than {_BUDGET} bytes of its arrays")
        self._file.seek(begin)
        return self._file.read(count).ljust(count, b"\0")


@dataclasses.dataclass(frozen=True)
class Item:
    """A group or a data set: the names that lead to it, and where its header stands."""

    file: File
    path: tuple[str, ...]
    address: int

    @property
    def name(self) -> str:
        """For errors."""
        return shown("/".join(self.path) or "/")

    def messages(self) -> list[tuple[int, int, bytes]]:
        """What its header has: kinds, flags and contents of its messages."""
        read = self.file.read
        version, size = struct.unpack("<B7xI4x", read(self.address, 16, self.name))
        if version != 1:
            raise MalformedError(f"the header of {self.name} is none that Keras writes")
        found, blocks, seen = [], [(self.address + 16, size)], set()
        while blocks:
            begin, size = blocks.pop(0)
            if begin in seen:
                raise MalformedError(f"the header of {self.name} goes on in itself")
            seen.add(begin)
            block = read(begin, size, f"the header of {self.name}")
            at = 0
            while at + 8 <= size:
                kind, length, flags = struct.unpack_from("<HHB", block, at)
                content = block[at + 8 : at + 8 + length]
                at += 8 + length
                if at > size or (kind == _CONTINUATION and length < 16):
                    raise MalformedError(f"the header of {self.name} is damaged")
                if kind == _CONTINUATION:
                    blocks.append(struct.unpack_from("<QQ", content))
                else:
                    found.append((kind, flags, content))
        return found

    def attributes(self) -> set[str]:
        """The names of its attributes, whose values are never read."""
        found = set()
        for kind, _, content in self.messages():
            if kind == _ATTRIBUTE and len(content) >= 8:
                begin = 9 if content[0] == 3 else 8
                length = struct.unpack_from("<H", content, 2)[0]
                found.add(_text(content[begin : begin + length]))
        return found

    def place(self) -> Place | None:
        """Where the bytes of a data set lie; None: it is a group.

        Raises:
          MalformedError: they lie nowhere, elsewhere or in no one piece, or are no numbers in
            floating point; or it is neither a data set nor a group.
        """
        messages = self.messages()
        by_kind = {kind: content for kind, _, content in messages}
        if len(messages) > len(by_kind) and sum(k == _LAYOUT for k, *_ in messages) > 1:
            raise MalformedError(f"{self.name} lies in two places")
        if by_kind.keys() & {_SYMBOLS, _LINKS, _LINK}:
            return None
        if not by_kind.keys() >= {_SPACE, _TYPE, _LAYOUT} or any(
            f & _SHARED for _, f, _ in messages
        ):
            raise MalformedError(f"{self.name} is neither a group nor a data set, or in parts")
        if _EXTERNAL in by_kind:
            raise MalformedError(f"the data of {self.name} are in other files, by external storage")
        layout = by_kind[_LAYOUT].ljust(18, b"\0")
        if layout[0] not in (3, 4) or layout[1] != 1 or _FILTERS in by_kind:
            how = _KINDS_OF_LAYOUT.get(layout[1], "in another way")
            how = "compressed or filtered" if _FILTERS in by_kind else how
            raise MalformedError(
                f"the data of {self.name} are stored {how}, as Keras does not. Copy the file by "
                f"h5repack --filter=NONE --layout=CONTI"
            )
        dtype = _dtype(self.name, by_kind[_TYPE])
        shape = _shape(self.name, by_kind[_SPACE])
        begin, size = struct.unpack_from("<QQ", layout, 2)
        needed = math.prod(shape) * dtype.itemsize
        if size != needed or begin + size > self.file.size:
            raise MalformedError(
                f"{self.name} is {dtype} of shape {shown(shape)}, {needed} bytes, for which there "
                f"are no data in the file"
            )
        return Place(dtype, shape, begin)

    def items(self) -> Iterator["Item"]:
        """What a group holds.

        Raises:
          MalformedError: one of them is not in it but linked from elsewhere, or it is damaged.
        """
        for kind, _, content in self.messages():
            if kind in (_LINKS, _LINK):
                raise MalformedError(
                    f"the group {self.name} has links to other files (external links), or such as "
                    f"Keras does not write"
                )
            if kind == _SYMBOLS:
                if len(content) < 16:
                    raise MalformedError(f"the header of {self.name} is damaged")
                yield from self._symbols(*struct.unpack_from("<QQ", content))

    def child(self, name: str) -> "Item | None":
        """What a group has under a name."""
        return next((item for item in self.items() if item.path[-1] == name), None)

    def _symbols(self, tree: int, heap: int) -> Iterator["Item"]:
        what, read = f"the table of the group {self.name}", self.file.read
        start, names = struct.unpack("<4s20xQ", read(heap, 32, what))
        if start != b"HEAP":
            raise MalformedError(f"{what} is damaged")
        nodes, seen, found = [tree], set(), set()
        while nodes:
            address = nodes.pop()
            if address in seen:
                raise MalformedError(f"{what} goes round in a circle")
            seen.add(address)
            start = read(address, 8, what)
            if start[:5] == b"TREE\0":
                count = struct.unpack_from("<H", start, 6)[0]
                # Keys, of which none is needed, and nodes in turn.
                keyed = struct.unpack(f"<{2 * count}Q", read(address + 24, 16 * count, what))
                nodes += keyed[1::2][::-1]
            elif start[:4] == b"SNOD":
                count = struct.unpack_from("<H", start, 6)[0]
                entries = read(address + 8, 40 * count, what)
                for offset, header, kind in struct.iter_unpack("<QQI20x", entries):
                    begin = names + offset
                    room = max(0, min(_MAX_NAME, self.file.size - begin))
                    name, end, _ = read(begin, room, what).partition(b"\0")
                    item = Item(self.file, (*self.path, _text(name)), header)
                    if not end or not name or name in found or len(item.path) > _MAX_DEPTH:
                        raise MalformedError(
                            f"{item.name} has a name that is empty, too long or there twice, or "
                            f"lies in more than {_MAX_DEPTH} groups"
                        )
                    found.add(name)
                    if kind == _SOFT_LINK:
                        raise MalformedError(
                            f"{item.name} is a soft link to elsewhere, as Keras writes none"
                        )
                    yield item
            else:
                raise MalformedError(f"{what} is damaged")


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="backslashreplace")


def _dtype(name: str, content: bytes) -> np.dtype:
    """IEEE's floating point of 16 to 64 bits, of either order of bytes."""
    size = _FLOATS.get(content[4:20]) if len(content) >= 20 else None
    # The class in the lower half byte; then order, normalization, and the place of the sign.
    if size is None or content[0] & 15 != 1 or content[1] not in (0x20, 0x21):
        raise MalformedError(f"{name} holds no floating-point numbers of 16, 32 or 64 bits")
    if content[2] != 8 * size - 1 or content[3] != 0:
        raise MalformedError(f"{name} holds no floating-point numbers of IEEE's form")
    return np.dtype(f"{'>' if content[1] & 1 else '<'}f{size}")


def _shape(name: str, content: bytes) -> tuple[int, ...]:
    version, rank, _, kind = content.ljust(4, b"\0")[:4]
    begin = {1: 8, 2: 4}.get(version)
    if begin is None or len(content) < begin + 8 * rank or (version == 2 and kind == 2):
        raise MalformedError(f"{name} is of no shape")
    shape = struct.unpack_from(f"<{rank}Q", content, begin)
    if not is_shape(list(shape)):
        raise MalformedError(f"{name} is of shape {shown(shape)}, which no array has")
    return shape
