"""Whether a JPEG that says it has ended really holds all of its pixels.

Decoders fill up with gray what is missing before the end marker, and tell nobody but stderr. So the
file itself is asked: bytes slipped in before the marker are skipped where all pixels are there
already, and become pixels where some are missing.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

_START_OF_SCAN = b"\xff\xda"
_END_OF_IMAGE = b"\xff\xd9"
# Frames of one Huffman-coded scan with three channels or one; and what no Huffman table decodes.
_PLAIN_FRAMES = b"\xff\xc0\x00\x11", b"\xff\xc0\x00\x0b"
_ARITHMETIC_FRAMES = b"\xff\xc9", b"\xff\xca"
_LUMA = np.array([0.299, 0.587, 0.114])
_FILLED = 128  # luma of what decoders fill up with; the colours next to it may run into it
# For hundreds of symbols, so that some pixel changes if they are decoded; and the same behind each
# of the eight restart markers, one of which a decoder may wait for.
_NOISE = bytes(range(64))
_SLIPPED_IN = _NOISE + b"".join(bytes([0xFF, 0xD0 + i]) + _NOISE for i in range(8))


def may_end_early(encoded: bytes, last_pixel: np.ndarray) -> bool:
    """Whether `ends_early` has to look: False of nearly all whole files, at next to no cost.

    Also False of a plain file that lacks but a part of its last block, 8 x 8 to 16 x 16 pixels.

    Args:
      encoded: the whole file.
      last_pixel: its bottom right one as stored (not turned), uint8 `[3]`, RGB.
    """
    start = _after_applications(encoded)  # which may hold a small JPEG themselves
    if encoded.count(_START_OF_SCAN, start) == 1 and any(
        frame in encoded[start:] for frame in _PLAIN_FRAMES
    ):
        return bool(abs(last_pixel @ _LUMA - _FILLED) < 1.5)
    # Of a progressive file the last pixel may lack its detail alone; CMYK fills with another gray.
    return True


def ends_early(encoded: bytes) -> bool:
    """Whether a JPEG lacks some of its last pixels, though it has an end marker.

    It takes Pillow two decodings. A progressive file that is cut off between two scans is complete,
    with less detail, and passes; so does arithmetic coding, which has no clear end.

    Args:
      encoded: the whole file, which Pillow can decode.
    """
    end = encoded.rfind(_END_OF_IMAGE)
    if end < 0 or any(frame in encoded for frame in _ARITHMETIC_FRAMES):
        return False
    return _pixels(encoded) != _pixels(encoded[:end] + _SLIPPED_IN + encoded[end:])


def _pixels(encoded: bytes) -> bytes:
    with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
        return image.tobytes()


def _after_applications(encoded: bytes) -> int:
    """Where the segments end that belong to applications (APP0 to APP15) or are comments."""
    start = 2
    while encoded[start : start + 1] == b"\xff" and encoded[start + 1 : start + 2] in _OTHERS:
        start += 2 + int.from_bytes(encoded[start + 2 : start + 4])
    return start


_OTHERS = {bytes([marker]) for marker in (*range(0xE0, 0xF0), 0xFE)}
