"""From uint8 images to what a network takes: by what its file tells, and by flags for the rest.

Pixels are those of `ab_jax.data.augment.normalize`: scaled to 0 to 1, less each channel's mean,
divided by its standard deviation. Here without JAX.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.exported.image_classifier import check_images, class_names_of, shown

LAYOUTS = ("NHWC", "NCHW")
_CHANNELS = (1, 3)  # of images in files
_MOST_OF_NAMES = 2**22  # bytes of a file of names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What the user tells of a network.

    Attributes:
      mean, std: by which images are normalized, for pixels in 0 to 1; one number for each channel,
        or one for all.
      image_size: height and width in pixels.
      layout: one of `LAYOUTS`.
      class_names: of each logit, which win over those in a network's file.
      output: name of the output with the logits.
      softmax: as of `Classifier`.

    Raises:
      ValueError: a value that makes no sense; names the flag.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    layout: str | None = None
    class_names: tuple[str, ...] | None = None
    output: str | None = None
    softmax: bool | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("Give both of --mean and --std, or neither.")
        if self.mean is not None and self.std is not None:
            if {len(self.mean), len(self.std)} - set(_CHANNELS):
                raise ValueError(
                    f"--mean has {len(self.mean)} numbers and --std {len(self.std)}. Give one for "
                    f"each channel, or one for all."
                )
            if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
                raise ValueError(
                    f"--mean is {self.mean} and --std {self.std}: they must be finite, and those "
                    f"of --std above 0."
                )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size={self.image_size} must be at least 1 pixel.")
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"--layout={self.layout} is none of {', '.join(LAYOUTS)}.")

    def names(self, path: Path, in_file: Any) -> tuple[str, ...] | None:
        """The names of the classes: those that were told, else those of a network's file.

        Raises:
          ValueError: the file's are no list of texts.
        """
        return class_names_of(path, in_file) if self.class_names is None else self.class_names

    def refuse(self, path: Path, *fields: str) -> None:
        """Refuse what a kind of file leaves no choice of.

        Raises:
          ValueError: one of these fields was told.
        """
        for name in fields:
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} does not apply to {path}. Omit it.")


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names of classes from a text file, one a line.

    Raises:
      ValueError: it is no such file; names it. OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"--class_names={path} is no regular file.")
    with path.open("rb") as file:
        data = file.read(_MOST_OF_NAMES + 1)
    if len(data) > _MOST_OF_NAMES:
        raise ValueError(f"--class_names={path} has more than {_MOST_OF_NAMES} bytes.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--class_names={path} is no text in UTF-8: {error.reason}.") from error
    names = [line.strip() for line in text.rstrip().split("\n")]
    if "" in names:
        raise ValueError(
            f"--class_names={path} has no name in line {names.index('') + 1}. Give one a line."
        )
    return tuple(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What a network takes, made of uint8 images `[batch, *image_shape]` by calling it.

    Attributes:
      image_shape: (height, width, channels).
      batch: how many images; None: any number.
      layout: one of `LAYOUTS`.
      dtype: uint8, int8 or float32.
      mean, std: by which images are normalized, for each channel; None: pixels go in as they are.
      scale, zero_point: of integers, `(integer - zero_point) * scale` is the normalized pixel.
    """

    image_shape: tuple[int, int, int]
    batch: int | None
    layout: str
    dtype: np.dtype
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    scale: float = 1.0
    zero_point: int = 0

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The input, `[batch, *image_shape]` or with channels before height and width."""
        x = pixels
        if self.mean is not None and self.std is not None:
            # The arithmetic of `normalize`, in its order.
            center = np.array([255.0 * m for m in self.mean], np.float32)
            factor = np.array([1.0 / (255.0 * s) for s in self.std], np.float32)
            x = (pixels.astype(np.float32) - center) * factor
            if self.dtype.kind != "f":
                ends = np.iinfo(self.dtype)
                codes = np.rint(x / np.float32(self.scale)) + self.zero_point
                x = np.clip(codes, ends.min, ends.max)
        if self.layout == "NCHW":
            x = x.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(x, self.dtype)


def image_input(
    path: Path,
    told: Told,
    shape: Sequence[Any],
    dtype: np.dtype,
    *,
    mean: Any = None,
    std: Any = None,
    quantization: tuple[float, int] | None = None,
) -> ImageInput:
    """How images become the input of a network.

    Args:
      path: of its file, for errors.
      told: by the user.
      shape: of its input, four sizes of which those that are no integers above -1 are open.
      dtype: of its input.
      mean, std: as its file tells them, JSON values; None: it does not.
      quantization: scale and zero point of its input, where the file has them.

    Raises:
      ValueError: what is told contradicts the file, or something is missing; names the fix.
    """
    if dtype not in (np.float32, np.uint8, np.int8):
        raise ValueError(f"{path} takes images of {dtype}, not of float32, uint8 or int8.")
    if dtype == np.int8 and quantization is None:
        raise ValueError(f"{path} takes images of int8, and tells no scale of these integers.")
    if len(shape) != 4:
        raise ValueError(f"{path} takes no images [batch, height, width, channels].")
    sizes = [size if type(size) is int and size >= 0 else None for size in shape]
    layout = _layout(path, told, sizes)
    batch, *inner = sizes
    channels, height, width = inner if layout == "NCHW" else [inner[2], *inner[:2]]
    size = told.image_size
    for found in (height, width):
        if size is not None and found not in (None, size):
            raise ValueError(
                f"--image_size={size}, but {path} takes images of {height} x {width} pixels. "
                f"Omit it."
            )
    if channels is None and told.mean is not None and told.std is not None:
        channels = max(len(told.mean), len(told.std))
    image_shape: Any = (
        size if height is None else height,
        size if width is None else width,
        channels,
    )
    check_images(path, image_shape, batch)
    numbers = _normalization(path, told, image_shape[2], dtype, mean, std, quantization)
    scale, zero_point = quantization or (1.0, 0)
    return ImageInput(
        image_shape=image_shape,
        batch=batch,
        layout=layout,
        dtype=np.dtype(dtype),
        mean=numbers and numbers[0],
        std=numbers and numbers[1],
        scale=scale,
        zero_point=zero_point,
    )


def _layout(path: Path, told: Told, sizes: list[int | None]) -> str:
    """By where the channels are: of squares of pixels with 1 or 3 of them, at one end or other."""
    if told.layout is not None:
        return told.layout
    _, first, _, last = sizes
    if first in _CHANNELS and last in _CHANNELS:
        raise ValueError(
            f"{path} takes images of shape {sizes[1:]}, whose channels may be first or last. Give "
            f"--layout, of {' or '.join(LAYOUTS)}."
        )
    if first is None and last is None:
        raise ValueError(
            f"{path} leaves open where the channels of images are: give --layout, of "
            f"{' or '.join(LAYOUTS)}, and --image_size."
        )
    return "NCHW" if first in _CHANNELS else "NHWC"


def _normalization(
    path: Path,
    told: Told,
    channels: int,
    dtype: np.dtype,
    mean: Any,
    std: Any,
    quantization: tuple[float, int] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std for each channel; None: pixels go in as they are."""
    own = None
    if mean is not None and std is not None:
        if not _numbers(mean, channels) or not _numbers(std, channels) or min(std) <= 0:
            raise ValueError(
                f"{path} tells a mean of {shown(mean)} and a std of {shown(std)}, not a number for "
                f"each of {channels} channels, those of std above 0. Export it anew."
            )
        own = tuple(map(float, mean)), tuple(map(float, std))
    given = None
    if told.mean is not None and told.std is not None:
        if {len(told.mean), len(told.std)} - {1, channels}:
            raise ValueError(
                f"--mean has {len(told.mean)} numbers and --std {len(told.std)}, but the images of "
                f"{path} have {channels} channels."
            )
        given = _each(told.mean, channels), _each(told.std, channels)
    if own is not None and given is not None and not np.allclose(own, given, rtol=1e-6, atol=1e-9):
        raise ValueError(
            f"--mean and --std are {given[0]} and {given[1]}, but {path} tells {own[0]} and "
            f"{own[1]}. Omit them."
        )
    if dtype == np.uint8 and quantization is None:
        if given is not None and own is None:
            raise ValueError(
                f"{path} takes pixels as they are, uint8, and normalizes them by itself. Omit "
                f"--mean and --std."
            )
        return None
    if own is None and given is None and dtype != np.uint8:
        raise ValueError(
            f"{path} takes images that are normalized already, {dtype}, and does not tell the "
            f"mean and std by which. Give --mean and --std, for pixels in 0 to 1, or export a run "
            f"of newer code."
        )
    return own if given is None else given


def _each(numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return numbers * channels if len(numbers) == 1 else numbers


def _numbers(values: Any, count: int) -> bool:
    """Whether a JSON value is a list of so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(x) in (int, float) and abs(x) < 2**64 for x in values)
    )
