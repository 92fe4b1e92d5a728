"""What a loaded data set is: images and labels as NumPy arrays, in three parts."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of one size, held in memory.

    Attributes:
      images: uint8 `[N, H, W, C]`.
      labels: int32 `[N]`, class indices from 0.

    Raises:
      TypeError: a dtype is not the one above.
      ValueError: a shape is not the one above, the two lengths differ, or a label is negative.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got {self.images.dtype}")
        if self.labels.dtype != np.int32:
            raise TypeError(f"labels must be int32, got {self.labels.dtype}")
        if self.images.ndim != 4:
            raise ValueError(f"images must be [N, H, W, C], got shape {self.images.shape}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must have shape {self.images.shape[:1]}, one for each image, "
                f"got {self.labels.shape}"
            )
        if self.labels.size and self.labels.min() < 0:
            raise ValueError(f"labels must be 0 or more, got {self.labels.min()}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | np.ndarray) -> Images:
        """The images at `index`, a slice or an index array, with their labels."""
        return Images(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in its three parts.

    Attributes:
      name: what `load` was asked for.
      version: version of the prepared copy, such as `"1.0.0"`.
      train: the images to train on, without those of `validation`.
      validation: the images to choose hyper-parameters on.
      test: the images of the final number, read once.
      class_names: one name for each label.
      mean: mean of each channel over `train`, with pixels in 0..1.
      std: standard deviation of each channel over `train`, with pixels in 0..1.

    Raises:
      ValueError: the parts differ in image shape, a label has no class name, or `mean` or `std`
        has not one number for each channel.
    """

    name: str
    version: str
    train: Images
    validation: Images
    test: Images
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for part, images in self.parts.items():
            if images.images.shape[1:] != self.image_shape:
                raise ValueError(
                    f"{self.name}: {part} images have shape {images.images.shape[1:]}, "
                    f"train images {self.image_shape}"
                )
            if len(images) and images.labels.max() >= self.num_classes:
                raise ValueError(
                    f"{self.name}: {part} holds label {images.labels.max()}, "
                    f"but there are {self.num_classes} class names"
                )
        channels = self.image_shape[-1]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"{self.name}: images have {channels} channels, "
                f"mean has {len(self.mean)} numbers and std has {len(self.std)}"
            )

    @property
    def parts(self) -> dict[str, Images]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, `(H, W, C)`."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units where the pixels run from 0 to 1.

    Args:
      images: uint8 `[N, H, W, C]`, at least one image.

    Returns:
      Two tuples of `C` floats.
    """
    # Through the histogram of the 256 values: exact sums, and no float copy of the images.
    levels = np.arange(256) / 255.0
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean = float(share @ levels)
        means.append(mean)
        deviations.append(float(np.sqrt(share @ (levels - mean) ** 2)))
    return tuple(means), tuple(deviations)
