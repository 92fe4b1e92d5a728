"""Tiny ImageNet for networks that were trained on ImageNet: 200 of its classes, enlarged.

It is read from where `ab_jax.data.prepare tiny_imagenet` prepared it. An accuracy on 64 pixels,
enlarged, is much below the network's own; differences between networks are what it shows.
"""

import dataclasses
import os

import numpy as np

from ab_jax.data.dataset import Images
from ab_jax.data.prepared import open_prepared, read_prepared, resolve_data_dir
from experiments.pretrained.imagenet_classes import class_index
from experiments.pretrained.images import ImageSet, drawn, ranks

_NAME = "tiny_imagenet"
CALIBRATION = 1600  # images
_CHOICE = 2  # of each class


@dataclasses.dataclass(frozen=True)
class TinyPhotographs:
    """Tiny ImageNet's images to calibrate with, to choose settings on, and to read.

    Labels and `classes` are in ImageNet's order. The methods raise FileNotFoundError where it is
    not prepared, with the command that does it, and ValueError where that is damaged.

    Attributes:
      size: height and width of the enlarged images, in pixels.
      data_dir: where prepared data lie; None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
    """

    size: int = 224
    data_dir: str | os.PathLike[str] | None = None

    def calibration(self, count: int | None = CALIBRATION, *, draw: int = 0) -> ImageSet:
        """Training images to calibrate with, spread over classes, in mixed order.

        Args:
          count: how many; None: all but those of `choice`.
          draw: the seed; the same one draws the same images for good.

        Raises:
          ValueError: there are fewer than `count`.
        """
        train, classes = self._split("train")
        others = np.flatnonzero(~_choice(train.labels))
        return self._labelled(train[others[drawn(train.labels[others], count, draw)]], classes)

    def choice(self) -> ImageSet:
        """The 400 training images, two of each class, that no draw calibrates with."""
        train, classes = self._split("train")
        return self._labelled(train[np.flatnonzero(_choice(train.labels))], classes)

    def test(self) -> ImageSet:
        """The 10,000 validation images, whose accuracy is read."""
        return self._labelled(*self._split("validation"))

    def _split(self, split: str) -> tuple[Images, np.ndarray]:
        """The images of a split, and the ImageNet label of each of their own, int32 `[200]`."""
        data_dir = resolve_data_dir(self.data_dir)
        # Not what the classes are called, which is what loaded data sets have, but their ids.
        ids = open_prepared(_NAME, data_dir).info.features["label"].names
        classes = [class_index(wnid) for wnid in ids]
        if None in classes:
            raise ValueError(
                f"{_NAME} in {data_dir} has the class {ids[classes.index(None)]}, which is none of "
                f"ImageNet's"
            )
        images = read_prepared(_NAME, data_dir, splits=[split]).splits[split]
        return images, np.asarray(classes, np.int32)

    def _labelled(self, images: Images, classes: np.ndarray) -> ImageSet:
        return ImageSet(images.images, self.size, classes[images.labels], np.sort(classes))


def _choice(labels: np.ndarray) -> np.ndarray:
    """Which images are to choose on: each class's last, in the stored order, which is mixed."""
    return ranks(labels[::-1])[::-1] < _CHOICE
