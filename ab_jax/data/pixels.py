"""From an encoded image to an array of pixels, and to a smaller one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ab_jax.data.limits import check_declared_pixels, check_pixels


def decode(encoded: bytes, name: str) -> np.ndarray:
    """Decodes a PNG or JPEG file to RGB.

    Pillow decodes, and not TFDS, so that the pixels do not depend on whether OpenCV is installed.
    Gray, palette and transparent images become RGB, as Pillow converts them.

    Args:
      encoded: the whole file.
      name: the file's name, for the error.

    Returns:
      uint8 `[H, W, 3]`.

    Raises:
      ValueError: the bytes are no PNG or JPEG image, or a damaged one, or one that declares more
        than `limits.MOST_PIXELS`; the message has `name`.
    """
    try:
        check_declared_pixels(encoded)
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            check_pixels(*image.size)  # of formats whose headers only Pillow reads here
            return np.asarray(image.convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(f"{name} is not a readable PNG or JPEG image: {error}") from error


def box_downsample(image: np.ndarray, size: int, name: str) -> np.ndarray:
    """Makes a square image smaller by averaging equal boxes of pixels.

    Args:
      image: uint8 `[H, W, C]` with `H == W`, a multiple of `size`.
      size: height and width of the result, in pixels.
      name: the image's name, for the error.

    Returns:
      uint8 `[size, size, C]`, each value the exact mean of its box, halves rounded up.

    Raises:
      ValueError: the image is not square, or `size` does not divide its height.
    """
    height, width, channels = image.shape
    if height != width or height % size:
        raise ValueError(
            f"image_size={size} must divide the height of a square image, "
            f"and {name} has {height} x {width} pixels"
        )
    box = height // size
    if box == 1:
        return image
    sums = image.reshape(size, box, size, box, channels).sum(axis=(1, 3), dtype=np.uint32)
    return ((sums + box * box // 2) // (box * box)).astype(np.uint8)
