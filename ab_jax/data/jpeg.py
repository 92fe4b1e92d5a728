"""From the bytes of a photograph to a square image of the network's size, with OpenCV.

Training takes a random part of the photograph (random-resized crop, arXiv 1409.4842, section 6),
evaluation its center. The parts' sizes are those of torchvision's reference training.
"""

from __future__ import annotations

import numpy as np

from ab_jax.data.limits import check_pixels, declared_size
from ab_jax.data.pixels import decode
from ab_jax.data.rgb import orientation_of, turned
from ab_jax.data.whole_jpeg import may_end_early

_AREA = 0.08, 1.0  # of a random part, as a share of the photograph
_ASPECT = 3 / 4, 4 / 3  # its width over its height
_TRIES = 10
_CENTER = 224 / 256  # side of the center crop, as a share of the shorter side
_END_OF_IMAGE = b"\xff\xd9"


def decode_photo(encoded: bytes, name: str, *, upright: bool = False) -> np.ndarray:
    """Decodes an image file to RGB as `decode` does, and plain JPEGs faster than Pillow.

    Args:
      encoded: the whole file.
      name: what to call the file in the error.
      upright: whether to turn the pixels as the file notes (EXIF). By default that is ignored, as
        elsewhere with ImageNet.

    Returns:
      uint8 `[H, W, 3]`.

    Raises:
      ValueError: as `decode`; the message has `name`.
    """
    import cv2

    # OpenCV fills up with gray what is missing at the end, without a word. Bytes behind the end are
    # harmless, so that Pillow, which knows the difference, has to look at such files. And it knows
    # how large an image is before it decodes one; so do we where the header is plain.
    size = declared_size(encoded)
    if size is None or encoded[:2] != b"\xff\xd8" or encoded[-2:] != _END_OF_IMAGE:
        return decode(encoded, name, upright=upright)
    try:
        check_pixels(*size)
    except ValueError as error:
        raise ValueError(f"{name} is not a readable JPEG image: {error}") from error
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    # So does Pillow where an end marker stands behind what is there; `decode` has a closer look.
    if image is None or may_end_early(encoded, image[-1, -1]):
        return decode(encoded, name, upright=upright)
    return turned(np.asarray(image), orientation_of(encoded)) if upright else np.asarray(image)


def random_resized_crop(
    image: np.ndarray, square: np.ndarray, generator: np.random.Generator, *, flip: bool
) -> None:
    """A random part of a photograph, stretched to a square, half of the time mirrored.

    The part has 8 % to 100 % of the area and an aspect ratio of 3/4 to 4/3. Where ten draws do not
    fit into the photograph, it is the largest one around the center that has such a ratio.

    Args:
      image: uint8 `[H, W, 3]`.
      square: where to write the result, uint8 `[size, size, 3]`, such as its place in a batch.
      generator: where the randomness comes from.
      flip: whether to mirror at random.
    """
    import cv2

    top, left, height, width = random_part(image.shape[0], image.shape[1], generator)
    _resize(image[top : top + height, left : left + width], square)
    if flip and generator.random() < 0.5:
        cv2.flip(square, 1, dst=square)


def random_part(
    height: int, width: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Where `random_resized_crop` cuts: top, left, height and width, in pixels.

    Args:
      height, width: of the photograph, in pixels.
      generator: where the randomness comes from.
    """
    for _ in range(_TRIES):
        area = height * width * generator.uniform(*_AREA)
        aspect = np.exp(generator.uniform(*np.log(_ASPECT)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.integers(height - h + 1))
            return top, int(generator.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * _ASPECT[1])))
    h = min(height, max(1, round(width / _ASPECT[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop(image: np.ndarray, square: np.ndarray) -> None:
    """The middle of a photograph: a square with 7/8 of its shorter side, resized.

    Args:
      image: uint8 `[H, W, 3]`.
      square: where to write the result, uint8 `[size, size, 3]`.
    """
    height, width = image.shape[:2]
    side = max(1, round(_CENTER * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    _resize(image[top : top + side, left : left + side], square)


def _resize(image: np.ndarray, square: np.ndarray) -> None:
    import cv2

    size = square.shape[0]
    # Averages over areas where the image shrinks, since interpolation would skip pixels then.
    shrinks = min(image.shape[:2]) >= size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    # OpenCV writes elsewhere, without a word, where the place does not fit.
    written = cv2.resize(image, (size, size), dst=square, interpolation=method)
    assert np.may_share_memory(written, square)
