"""`load`: any of our data sets by name, cut into three parts; `facts`: what records tell of it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from ab_jax.data.dataset import Dataset, Images, channel_statistics
from ab_jax.data.parts import cut
from ab_jax.data.pixels import box_downsample
from ab_jax.data.prepared import Prepared, read_prepared, resolve_data_dir
from ab_jax.data.stream import StreamedDataset

NAMES = ("digits", "cifar10", "cifar10_jpeg", "tiny_imagenet", "image_folder:NAME")
DIGITS_TEST = 400  # images of the 1,797
DIGITS_VALIDATION = 200


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: int | None = None,
    image_size: int | None = None,
    classes: int | None = None,
) -> Dataset:
    """Loads a data set into memory. The same arguments give the same arrays, everywhere.

    The first call decodes the images and keeps them beside the records, for the next to read.

    - `digits`: scikit-learn's 1,797 gray images of 8 x 8 pixels, 0..16 scaled to 0..255; nothing to
      prepare. Our fixed split has 400 test images.
    - `cifar10`: the original, as TFDS's official builder prepares it.
    - `cifar10_jpeg`: CIFAR-10 re-encoded as JPEG.
    - `tiny_imagenet`: 200 classes of 64 x 64 pixels; its validation images are the test part.
    - `image_folder:NAME`: a folder of images, prepared under NAME. Its own validation split is the
      validation part; where it has no test split, it is the test part (as with ImageNet), and the
      validation part is cut from the training images.

    The validation part is the last `validation` training images in the stored order, which is
    random but fixed, so that every class has about its share.

    Args:
      name: one of the names above.
      data_dir: where the prepared data lie; default `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.
      validation: number of training images to cut off for validation; 0: none. Default: 200 for
        `digits`, elsewhere a tenth of the training images: 5,000 of CIFAR-10.
      image_size: average all images down to this height and width, in pixels; must divide theirs.
        Default: as they are.
      classes: keep the images of so many classes, the first ones. Default: of all.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`; the message says how to.
      ValueError: an unknown name, more `classes` than there are, a `validation` that leaves no
        training image or that a folder with splits of its own has no use for, an `image_size` that
        does not divide the images', or images of different sizes.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be 1 or more pixels, got {image_size}")
    if name == "digits":
        prepared = _digits(image_size)
    elif name in NAMES[:-1] or _is_folder(name):
        prepared = read_prepared(name, resolve_data_dir(data_dir), image_size)
    else:
        raise ValueError(f"no data set named {name!r}; there are {', '.join(NAMES)}")
    if classes is not None:
        prepared = _first_classes(name, prepared, classes)
    sizes = {split: len(images) for split, images in prepared.splits.items()}
    default = DIGITS_VALIDATION if name == "digits" else sizes.get("train", 0) // 10
    train, validation_part, test = (
        prepared.splits[part.split][part.start : part.stop]
        for part in cut(name, sizes, validation, default)
    )
    mean, std = channel_statistics(train.images)
    return Dataset(
        name=name,
        version=prepared.version,
        train=train,
        validation=validation_part,
        test=test,
        class_names=prepared.class_names,
        mean=mean,
        std=std,
    )


def _is_folder(name: str) -> bool:
    builder, _, folder = name.partition(":")
    return builder == "image_folder" and bool(folder)


def _digits(image_size: int | None) -> Prepared:
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    if image_size is not None:
        images = np.stack([box_downsample(image, image_size, "digits") for image in images])
    # By a hash, as TFDS shuffles, and not by a random generator, whose stream may change with the
    # version of NumPy.
    order = np.asarray(sorted(range(len(images)), key=_digest))
    shuffled = Images(images, bunch.target.astype(np.int32))[order]
    return Prepared(
        version="1.0.0",
        class_names=tuple(str(digit) for digit in bunch.target_names),
        splits={"train": shuffled[:-DIGITS_TEST], "test": shuffled[-DIGITS_TEST:]},
    )


def _digest(index: int) -> bytes:
    return hashlib.sha256(str(index).encode()).digest()


def _first_classes(name: str, prepared: Prepared, classes: int) -> Prepared:
    known = len(prepared.class_names)
    if not 1 <= classes <= known:
        raise ValueError(f"classes={classes} must be 1 to {known}, the number of classes of {name}")
    return dataclasses.replace(
        prepared,
        class_names=prepared.class_names[:classes],
        splits={split: part[part.labels < classes] for split, part in prepared.splits.items()},
    )


def facts(dataset: Dataset | StreamedDataset) -> dict[str, Any]:
    """Name, version, number of images, classes and their names, shape, channels' mean and std.

    As JSON values. What is exported of a run carries them: by mean and std (pixels in 0..1) images
    are normalized, and logits come in the order of the names. Mean and std of images in memory are
    those of the very training images, so that they tell other images under the same version; of a
    stream they are constants. They are rounded, since their last digits are the processor's.
    """
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {
        "name": dataset.name,
        "version": dataset.version,
        "images": {name: len(part) for name, part in parts.items()},
        "classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "mean": [round(mean, 6) for mean in dataset.mean],
        "std": [round(std, 6) for std in dataset.std],
    }
