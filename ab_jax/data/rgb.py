"""From an opened image of any kind to RGB pixels of 8 bits, the right way up."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, features

from ab_jax.data.whole_jpeg import ends_early, may_end_early

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_JPEG = ("JPEG", "MPO")  # Pillow's name for one that has further pictures behind it
_DEEP = 16  # bits of a channel; 24 bytes into a PNG file stands how many it has
_BIT_DEPTH = 24

# How to turn the pixels, by the orientation that a camera notes: where the first row and the first
# column of the file belong. 1 is upright; other numbers mean nothing.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def check_support(encoded: bytes) -> None:
    """Refuses what a Pillow that was built without a format cannot read.

    Raises:
      ValueError: the file is WebP, and Pillow has none.
    """
    if encoded[8:12] == b"WEBP" and not features.check("webp"):
        raise ValueError("it is WebP, which the Pillow that is installed was built without")


def rgb_of(image: Image.Image, encoded: bytes, *, upright: bool) -> np.ndarray:
    """The pixels of an image that Pillow has opened.

    Args:
      image: one of `FORMATS`.
      encoded: the whole file.
      upright: whether to turn the pixels as the file notes (EXIF).

    Returns:
      uint8 `[H, W, 3]`: 16-bit channels v as v / 257, rounded; gray, palette and transparent images
      as Pillow converts them.

    Raises:
      ValueError: a JPEG that ends before its last pixel, or pixels that cannot be scaled.
      OSError, SyntaxError: whatever Pillow raises over a damaged file.
    """
    pixels = np.asarray(_eight_bits(image, encoded).convert("RGB"))
    if image.format in _JPEG and may_end_early(encoded, pixels[-1, -1]) and ends_early(encoded):
        raise ValueError("it ends before its last pixel")
    return turned(pixels, orientation(image)) if upright else pixels


def orientation(image: Image.Image) -> int:
    """The orientation that an opened file notes, 1 to 8; 1, upright, where it notes none."""
    noted = image.getexif().get(ExifTags.Base.Orientation, 1)
    return noted if noted in _TURNS else 1


def orientation_of(encoded: bytes) -> int:
    """The same for a file that is not open, of which it reads the header alone."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            return orientation(image)
    except (OSError, SyntaxError, ValueError):
        return 1


def turned(pixels: np.ndarray, noted: int) -> np.ndarray:
    """Pixels `[H, W, C]` as they are to be seen, for an `orientation` of 1 to 8."""
    return np.ascontiguousarray(_TURNS[noted](pixels)) if noted in _TURNS else pixels


def _eight_bits(image: Image.Image, encoded: bytes) -> Image.Image:
    """The image with channels of 8 bits; Pillow itself would clip, or cut off the lower half."""
    image.load()
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(image)))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; convert them to 8 or 16")
    if image.format == "PNG" and encoded[_BIT_DEPTH] == _DEEP:  # in colours, or transparent
        import cv2

        deep = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is None or deep.dtype != np.uint16 or deep.shape[:2] != (image.height, image.width):
            raise ValueError("its pixels of 16 bits cannot be decoded")
        return Image.fromarray(_scaled(deep[..., 2::-1]))  # from BGR or BGRA
    return image


def _scaled(deep: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, to the nearest; no value lies between two."""
    return ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)
