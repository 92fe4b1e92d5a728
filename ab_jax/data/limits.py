"""How large an image may be: judged by what it declares, before anything of it is read.

A few bytes can claim any size. Of a file that is larger than its data set needs, not one byte is
read; of an image that declares too many pixels, none is decoded.
"""

from __future__ import annotations

import struct

# Of a file, in an archive or beside it. Also what the image below takes as 8-bit RGB.
MOST_BYTES = 2**28
# Height times width: 9,459 squared, and Pillow's own limit. ImageNet's largest has two thirds.
MOST_PIXELS = MOST_BYTES // 3


def check_bytes(size: int, name: str) -> None:
    """Refuses a file before it is read.

    Args:
      size: what it declares, in bytes.
      name: what to call it in the error.

    Raises:
      ValueError: it is larger than `MOST_BYTES`.
    """
    if size > MOST_BYTES:
        raise ValueError(
            f"{name} has {size:,} bytes, and at most {MOST_BYTES:,} are read of one file. Remove "
            f"it, or make it smaller"
        )


def check_pixels(width: int, height: int) -> None:
    """Refuses an image before it is decoded.

    Args:
      width, height: what its header declares, in pixels.

    Raises:
      ValueError: it has more than `MOST_PIXELS`.
    """
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"its header declares {width:,} x {height:,} pixels, and at most {MOST_PIXELS:,} "
            f"({MOST_BYTES:,} bytes) are decoded"
        )


def check_declared_pixels(encoded: bytes) -> None:
    """Does the same for a whole PNG or JPEG file, where its header is plain to read.

    Raises:
      ValueError: as `check_pixels`.
    """
    if (size := declared_size(encoded)) is not None:
        check_pixels(*size)


def declared_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height that the header of a PNG or JPEG file declares, in pixels.

    It takes a hundredth of the time in which Pillow opens a file.

    Args:
      encoded: the whole file.

    Returns:
      None where that is not plain to see; a decoder may still find it.
    """
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return struct.unpack(">II", encoded[16:24]) if len(encoded) >= 24 else None
    if encoded[:2] != b"\xff\xd8":
        return None
    start = 2  # of a segment: 255, its kind, two bytes of length, and in a frame bits and size
    while start + 9 <= len(encoded) and encoded[start] == 0xFF:
        kind, length, _, height, width = struct.unpack_from(">BHBHH", encoded, start + 1)
        if kind in _FRAMES:
            return width, height
        if kind == 0xFF:  # one of any number that may stand before a kind
            start += 1
            continue
        if kind < 0xC0 or kind in _WITHOUT_LENGTH or length < 2:
            return None
        start += 2 + length
    return None


_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # these three are tables
_WITHOUT_LENGTH = {*range(0xD0, 0xDB)}  # and where pixels start
