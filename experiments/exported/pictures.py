"""From an image file to pixels of a network's size, as the evaluation of our runs sees them."""

from pathlib import Path

import cv2
import numpy as np

from experiments.exported.decoding import decode

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_CENTER = 224 / 256  # side of the center crop, as a share of the shorter side
_MOST_BYTES = 2**28  # of a file, as `ab_jax.data.limits` has it


def images_in(path: Path) -> list[Path]:
    """The images that lie directly in a folder, by name; of a file itself.

    What does not end in one of `SUFFIXES`, or begins with a dot, is no image of a folder.

    Raises:
      ValueError: the folder has none. OSError: it cannot be read.
    """
    if not path.is_dir():
        return [path]
    found = sorted(
        inner
        for inner in path.iterdir()
        if inner.suffix.lower() in SUFFIXES and inner.name[0] != "." and inner.is_file()
    )
    if not found:
        raise ValueError(f"{path} has no images ({', '.join(SUFFIXES)}) directly in it.")
    return found


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
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file.")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes, the most that are read.")
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
