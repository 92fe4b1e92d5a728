"""From an image file to pixels of a network's size, as the evaluation of our runs sees them."""

from pathlib import Path

import cv2
import numpy as np

from experiments.exported.decoding import decode

_CENTER = 224 / 256  # side of the center crop, as a share of the shorter side


def read_picture(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of a PNG, JPEG, WebP or BMP file, turned as it notes (EXIF).

    An image of the network's size stays as it is. A square one whose side is a multiple of it is
    averaged over equal boxes, as data sets in memory are. Of any other, the middle square with 7/8
    of the shorter side is resized, as streamed photographs are.

    Args:
      path: of the file.
      image_shape: (height, width, channels) of the network; 1 channel is gray, 3 are RGB.

    Returns:
      uint8 `image_shape`.

    Raises:
      ValueError: it is no such file, or the network takes images of another kind. OSError: it
        cannot be read.
    """
    height, width, channels = image_shape
    if channels not in (1, 3) or height != width:
        raise ValueError(
            f"The network takes images of {height} x {width} pixels and {channels} channels; files "
            f"are read as squares of gray or RGB."
        )
    pixels = decode(path.read_bytes(), str(path), "L" if channels == 1 else "RGB")
    return fitted(pixels, height).reshape(image_shape)


def fitted(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 pixels [height, width] or [height, width, channels] as a square of `size`."""
    height, width = pixels.shape[:2]
    if height == width and height % size == 0:
        box = height // size
        sums = pixels.reshape(size, box, size, box, -1).sum(axis=(1, 3), dtype=np.uint32)
        return ((sums + box * box // 2) // (box * box)).astype(np.uint8)
    side = max(1, round(_CENTER * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    middle = pixels[top : top + side, left : left + side]
    # Averages over areas where the image shrinks, since interpolation would skip pixels then.
    method = cv2.INTER_AREA if side >= size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(middle, (size, size), interpolation=method))
