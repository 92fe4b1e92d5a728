"""Image files of every kind that is read, made of random pixels, with the pixels they stand for."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # of the tags of EXIF


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    """An image as a file; lossless WebP."""
    buffer = io.BytesIO()
    lossless = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(buffer, format=kind, **(lossless | options))
    return buffer.getvalue()


def noted(orientation: int) -> dict[str, Image.Exif]:
    """The option of `encoded` that notes an orientation, 1 to 8."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return {"exif": exif}


def deep_png(pixels: np.ndarray) -> bytes:
    """uint16 [H, W, C] as a PNG of 16 bits, by the book, since Pillow writes gray ones alone.

    C is 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGB and alpha).
    """
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def eight_bits(deep: np.ndarray) -> np.ndarray:
    """uint16 [H, W, C] as uint8 [H, W, 3] by the definition, v / 257 rounded, without alpha."""
    scaled = np.round(deep / 257).astype(np.uint8)
    return scaled[..., :3] if deep.shape[-1] > 2 else np.repeat(scaled[..., :1], 3, axis=-1)
