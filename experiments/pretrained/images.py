"""Sets of images in ImageNet's classes, and which of many images a draw takes."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator

import cv2
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Square images of one size, and the size at which a network takes them.

    Tiny ImageNet's are kept as they are and enlarged a batch at a time: enlarged to 224 pixels,
    10,000 of them would take 1.5 GB.

    Attributes:
      images: uint8 `[N, side, side, 3]`, RGB.
      size: height and width of what `pixels` and `batches` return.
      labels: int32 `[N]` in ImageNet's order, 0 to 999; None: nobody knows.
      classes: int32 `[K]`, sorted: the labels among which an accuracy on these images is read;
        None: all.
    """

    images: np.ndarray
    size: int
    labels: np.ndarray | None = None
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | np.ndarray) -> "ImageSet":
        """The images at `index`, a slice or an index array, with their labels."""
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=self.images[index], labels=labels)

    def pixels(self) -> np.ndarray:
        """All images, uint8 `[N, size, size, 3]`."""
        return resized(self.images, self.size)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields uint8 `[batch_size, size, size, 3]` in order; the last one may be shorter."""
        for start in range(0, len(self), batch_size):
            yield resized(self.images[start : start + batch_size], self.size)


def half_of_each(first: ImageSet, second: ImageSet) -> ImageSet:
    """Images of two sets in turn, at their size: half of them of each.

    Raises:
      ValueError: the sets differ in their number of images or in `size`.
    """
    if len(first) != len(second) or first.size != second.size:
        raise ValueError(
            f"two halves should have one number of images and one size, not {len(first)} of "
            f"{first.size} and {len(second)} of {second.size} pixels"
        )
    images = np.stack([first.pixels(), second.pixels()], 1)
    labels = None
    if first.labels is not None and second.labels is not None:
        labels = np.stack([first.labels, second.labels], 1).reshape(-1)
    return ImageSet(images.reshape(-1, *images.shape[2:]), first.size, labels)


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Square images, enlarged by linear interpolation (or made smaller by averages over areas).

    Args:
      images: uint8 `[N, side, side, 3]`.
      size: height and width of the result, in pixels.

    Returns:
      uint8 `[N, size, size, 3]`; `images` itself where it has that size.
    """
    side = images.shape[1]
    if side == size:
        return images
    method = cv2.INTER_LINEAR if side < size else cv2.INTER_AREA
    found = np.empty((len(images), size, size, 3), np.uint8)
    for image, place in zip(images, found, strict=True):
        place[:] = cv2.resize(image, (size, size), interpolation=method)
    return found


def drawn(labels: np.ndarray, count: int | None, draw: int) -> np.ndarray:
    """Which images a draw takes: spread over the classes, in mixed order.

    Every class has its first image before any has a second one, so that so does each beginning of
    a draw. What is drawn follows from hashes, since the streams of random generators may change
    with the version of NumPy.

    Args:
      labels: int `[N]`, of all images in an order that does not change.
      count: how many to take; None: all.
      draw: the seed.

    Returns:
      int `[count]`, indices.

    Raises:
      ValueError: there are fewer images, or `count` is not 1 or more.
    """
    if count is None:
        count = len(labels)
    if not 1 <= count <= len(labels):
        raise ValueError(f"{count} images are asked for, and there are {len(labels)} to draw from")
    mixed = np.asarray(sorted(range(len(labels)), key=lambda index: _digest(draw, index)))
    return mixed[np.argsort(ranks(labels[mixed]), kind="stable")][:count]


def ranks(labels: np.ndarray) -> np.ndarray:
    """How many images of the same class stand before each: int `[N]` for labels `[N]`."""
    seen: Counter[int] = Counter()
    found = np.empty(len(labels), np.int64)
    for index, label in enumerate(labels.tolist()):
        found[index] = seen[label]
        seen[label] += 1
    return found


def _digest(draw: int, index: int) -> bytes:
    return hashlib.sha256(f"{draw} {index}".encode()).digest()
