"""A network that classifies: uint8 images in, logits out, with the names of the classes.

A network may be anyone's. What it says of its images and classes is checked when it is read, what
it computes with each answer, and what does not hold is an error of one line that names the file.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_MOST = 2**26  # bytes of the images that a network takes at a time; all of ours take far less
_IMAGES = 32  # at a time, where they are that small
_MOST_LOGITS = 2**22  # of the images that are classified together
_APART = 1e-3  # from 1, of a sum of probabilities in float32


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network with all that it takes to name what is in an image.

    Attributes:
      path: of its file.
      logits: of uint8 images [batch, *image_shape]; numbers [batch, classes].
      image_shape: (height, width, channels).
      class_names: one for each logit, or None.
      batch: how many images `logits` takes, no more and no less; None: any number.
      softmax: whether it takes a softmax of the logits to make them probabilities; None: unless
        they are from 0 to 1 with a sum of 1 in every image, as behind a softmax in the network.

    Raises:
      ValueError: a shape of no images that files can be read as, or more of them than fit into
        memory; names that are none. Names the file.
    """

    path: Path
    logits: Callable[[np.ndarray], np.ndarray]
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] | None
    batch: int | None = None
    softmax: bool | None = None

    def __post_init__(self) -> None:
        check_images(self.path, self.image_shape, self.batch)

    @property
    def images_at_a_time(self) -> int:
        """How many images are read and classified together."""
        return self.batch or min(_IMAGES, max(1, _MOST // math.prod(self.image_shape)))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Of each class in at most `images_at_a_time` images, float64 [batch, classes].

        Raises:
          ValueError: the network gives none, or not as many as there are names; names its file.
        """
        count = len(images)
        if self.batch is not None and count < self.batch:
            # The last image again and again, whose further answers are left out.
            images = np.concatenate([images, np.repeat(images[-1:], self.batch - count, axis=0)])
        logits = np.asarray(self.logits(images))
        check_size(self.path, logits)
        numbers = np.issubdtype(logits.dtype, np.floating) or np.issubdtype(
            logits.dtype, np.integer
        )
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 1 or not numbers:
            raise ValueError(
                f"{self.path} gives {logits.dtype} of shape {logits.shape} for {len(images)} "
                f"images, not logits [batch, classes]."
            )
        if self.class_names is not None and logits.shape[1] != len(self.class_names):
            raise ValueError(
                f"{self.path} has {len(self.class_names)} class_names, and gives logits of "
                f"{logits.shape[1]} classes. Export it anew, or correct --class_names."
            )
        logits = logits[:count].astype(np.float64)
        if not np.isfinite(logits).all():
            raise ValueError(f"{self.path} gives logits that are not finite.")
        softmax = not _are_probabilities(logits) if self.softmax is None else self.softmax
        if not softmax:
            return logits
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def name(self, index: int) -> str:
        """Of a class, without what a terminal would act upon."""
        if self.class_names is None:
            return f"class {index}"
        name = self.class_names[index]
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def check_images(path: Path, image_shape: tuple[Any, ...], batch: int | None) -> None:
    """Refuse a network whose images no files can be read as, before anything is made for them.

    Args:
      path: of its file.
      image_shape: height, width and channels, of which None is one that nobody told.
      batch: as of `Classifier`.

    Raises:
      ValueError: it is one; names the file.
    """
    sizes = [*image_shape, 1 if batch is None else batch]
    if not all(type(size) is int and size >= 1 for size in sizes):
        raise ValueError(
            f"{path} takes images of shape {shown(sizes[:3])}, {shown(sizes[3])} at a time. "
            f"Height, width, channels and a fixed number must be at least 1; give --image_size, "
            f"and --mean of each channel, where the file leaves them open."
        )
    height, width, channels = image_shape
    if height != width or channels not in (1, 3):
        raise ValueError(
            f"{path} takes images of {height} x {width} pixels and {channels} channels; files are "
            f"read as squares of gray or RGB."
        )
    if math.prod(sizes) > _MOST:
        raise ValueError(
            f"{path} takes {sizes[3]} images of {height} x {width} pixels at a time, "
            f"{math.prod(sizes)} bytes; {_MOST} are the most that are read."
        )


def check_size(path: Path, logits: np.ndarray) -> None:
    """Refuse more logits than any network has, before anything is computed with them.

    Raises:
      ValueError: there are more than four million; names the file.
    """
    if logits.size > _MOST_LOGITS:
        raise ValueError(
            f"{path} gives logits of shape {shown(logits.shape)}; {_MOST_LOGITS} are the most that "
            f"are read."
        )


def class_names_of(path: Path, names: Any) -> tuple[str, ...] | None:
    """The names of the classes that a file tells; None: it tells none.

    Raises:
      ValueError: they are no list of texts; names the file.
    """
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"The class_names of {path} are {shown(names)}, not one text for "
            f"each class. Export it anew."
        )
    return tuple(names)


def _are_probabilities(values: np.ndarray) -> bool:
    """Whether values [batch, classes] are what a softmax gives: logits hardly ever are."""
    sums = values.sum(axis=1)
    return bool(((values >= 0) & (values <= 1)).all() and (abs(sums - 1) < _APART).all())


def line(error: Exception) -> str:
    """What an error says, on one line in ASCII, not too long."""
    return shown(str(error).partition("\n")[0])[1:-1]


def shown(value: Any) -> str:
    """A value of a file in an error: on one line, in ASCII, not too long."""
    try:
        text = ascii(value)
    except RecursionError:
        return "nested too deep to be shown"
    return text if len(text) <= 300 else f"{text[:300]}..."
