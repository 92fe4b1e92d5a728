"""Photographs in a folder or an archive, prepared as ImageNet's are for evaluation.

    0000_n01440764.jpg          of ImageNet's classes in their order, one each
    n01440764/ANY.jpg           classes by WordNet id, or by index: 0/ANY.jpg
    ANY.jpg                     no classes: to calibrate with alone

Directories may stand around either. Which images calibrate (and train) and which ones are read
never changes: of the first kind those of even number calibrate and those of odd number are read;
of the second kind so do each class's first, third, fifth... and second, fourth... by name.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from ab_jax.data.jpeg import center_crop, decode_photo
from ab_jax.data.layout import SUFFIXES, LeftOut, check_utf8, is_hidden, shown
from ab_jax.data.sources import entries
from experiments.pretrained.imagenet_classes import class_index
from experiments.pretrained.images import ImageSet, drawn, ranks

_NUMBERED = re.compile(r"(\d{4})_(n\d{8})\.[a-z]+")

WHERE_FROM = (
    "Photographs of ImageNet are not passed on with this project. They are a folder or a tar of "
    "NNNN_wnid.jpg, one a class, such as 0000_n01440764.jpg: NNNN is the class's number in "
    "ImageNet's order, 0000 to 0999, and their shorter side has 256 pixels. A folder of your own "
    "does as well: CLASS/FILE of such images as the network was trained on, each CLASS a WordNet "
    "id (n01440764) or such a number (0), or FILEs alone, without classes, to calibrate with"
)


@dataclasses.dataclass(frozen=True)
class Photographs:
    """Photographs to calibrate with and to read: the middle square, 7/8 of the shorter side.

    An image in memory takes `3 * size**2` bytes, 150 kB at 224 pixels.

    Attributes:
      path: a directory, or a .zip or .tar archive (.gz, .xz, .bz2).
      size: height and width of the images, in pixels.
    """

    path: Path
    size: int = 224

    def calibration(self, count: int | None = None, *, draw: int = 0) -> ImageSet:
        """Images to calibrate with, spread over classes, in mixed order.

        Args:
          count: how many; None: all there are.
          draw: the seed; the same one draws the same images for good.

        Raises:
          FileNotFoundError: there is nothing at `path`; the message says where from to have it.
          ValueError: it is no such folder or archive, there are fewer than `count`, or an image
            that cannot be read, which the message names.
        """
        files = [file for file in self._files() if not file.read]
        labels = np.asarray([-1 if file.label is None else file.label for file in files], np.int32)
        try:
            chosen = drawn(labels, count, draw)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error} (to calibrate with)") from error
        return self._decoded([files[index] for index in chosen])

    def test(self) -> ImageSet:
        """The images whose accuracy is read, sorted by name.

        Raises:
          FileNotFoundError: as `calibration`. ValueError: as `calibration`, or there are none, as
            of images without classes.
        """
        files = [file for file in self._files() if file.read]
        if not files:
            raise ValueError(
                f"{self.path} has no images to read an accuracy on. It is read on each class's "
                f"second, fourth... image by name, in CLASS/FILE, or on NNNN_wnid.jpg of odd NNNN"
            )
        return self._decoded(files)

    def _files(self) -> list["_File"]:
        if not self.path.exists():
            raise FileNotFoundError(
                f"--photographs={self.path}: there is no such file or directory. {WHERE_FROM}"
            )
        paths = set()
        for path, read in entries(self.path):
            if isinstance(read, LeftOut) or is_hidden(path) or not path.lower().endswith(SUFFIXES):
                continue
            check_utf8(path, self.path)
            paths.add(path)
        if not paths:
            raise ValueError(f"{self.path} has no images ({', '.join(SUFFIXES)}). {WHERE_FROM}")
        try:
            return _sorted_out(sorted(paths))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}. {WHERE_FROM}") from error

    def _decoded(self, files: list["_File"]) -> ImageSet:
        places = {file.path: index for index, file in enumerate(files)}
        images = np.empty((len(files), self.size, self.size, 3), np.uint8)
        for path, read in entries(self.path):
            if path in places and not isinstance(read, LeftOut):
                photograph = decode_photo(read(), f"{shown(path)} in {self.path}")
                center_crop(photograph, images[places[path]])
        labels = [file.label for file in files if file.label is not None]
        return ImageSet(images, self.size, np.asarray(labels, np.int32) if labels else None)


@dataclasses.dataclass(frozen=True)
class _File:
    path: str
    label: int | None
    read: bool  # for an accuracy; else it is to calibrate with


def _sorted_out(paths: list[str]) -> list[_File]:
    """What the names of all images say; sorted as they are.

    Raises:
      ValueError: a name contradicts itself, or the paths are of several kinds or of none.
    """
    numbered = [_NUMBERED.fullmatch(path.rpartition("/")[2].lower()) for path in paths]
    if all(numbered):
        for path, match in zip(paths, numbered, strict=True):
            if match and class_index(match[2]) != int(match[1]):
                raise ValueError(f"{shown(path)}: {match[2]} is not class {int(match[1])}")
        numbers = [int(match[1]) for match in numbered if match]
        return [_File(path, n, n % 2 == 1) for path, n in zip(paths, numbers, strict=True)]

    directories = [path.rpartition("/")[0] for path in paths]
    labels = [class_index(directory.rpartition("/")[2]) for directory in directories]
    if None not in labels:
        odd = ranks(np.asarray(labels)) % 2 == 1
        return [_File(*file) for file in zip(paths, labels, odd.tolist(), strict=True)]
    if len(set(directories)) == 1:
        return [_File(path, None, False) for path in paths]
    culprit = shown(paths[labels.index(None)])
    raise ValueError(f"the directory of {culprit} is none of ImageNet's 1,000 classes")
