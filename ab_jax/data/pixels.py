"""From an encoded image to an array of pixels, and to a smaller one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from ab_jax.data.limits import check_declared_pixels, check_pixels
from ab_jax.data.rgb import FORMATS, check_support, rgb_of


def decode(encoded: bytes, name: str, *, upright: bool = True) -> np.ndarray:
    """Decodes a PNG, JPEG, WebP or BMP file to RGB.

    Pillow decodes, and not TFDS, so that the pixels do not depend on whether OpenCV is installed
    (but for colours of 16 bits, of which Pillow has the upper halves alone). Gray, palette and
    transparent images become RGB, as Pillow converts them; of 16-bit channels v becomes v / 257,
    rounded. Of several pictures in a file it is the first.

    Args:
      encoded: the whole file.
      name: the file's name, for the error.
      upright: whether to turn the pixels as the file notes (EXIF), as every viewer does.

    Returns:
      uint8 `[H, W, 3]`.

    Raises:
      ValueError: the bytes are no such image, or a damaged one, or one that is cut off before its
        last block of 8 x 8 to 16 x 16 pixels, or one that declares more than `limits.MOST_PIXELS`;
        the message has `name`.
    """
    try:
        check_declared_pixels(encoded)
        check_support(encoded)
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            check_pixels(*image.size)  # of formats whose headers only Pillow reads here
            return rgb_of(image, encoded, upright=upright)
    except UnidentifiedImageError as error:  # whose message names a buffer of ours
        raise _unreadable(name, "it does not start as one") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, why: object) -> ValueError:
    return ValueError(f"{name} is not a readable PNG or JPEG image (nor WebP or BMP): {why}")


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
