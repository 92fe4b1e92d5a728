r"""Images to train a network of ImageNet a little further on, as data sets for --dataset.

    AB_JAX_PHOTOGRAPHS=PATH python -m experiments.mobilenet_v1_imagenet --width=0.25 \
        --dataset=experiments.pretrained.training_images:both --pad=0 --init_from=mobilenet.h5 \
        --teacher=start --rebase_norm --calibrate=coordinate_descent --relative_updates \
        --optimizer=adamw --learning_rate=1e-3 --epochs=4 --batch_size=32

`tiny`: 1,600 training images of Tiny ImageNet, enlarged; `photographs`: those of even number, of
the folder or archive that the environment variable AB_JAX_PHOTOGRAPHS names; `both`. Their pixels
run from -1 to 1, as networks of Keras want them; `efficientnet_tiny` and so on are for
EfficientNet-Lite. Labels are in ImageNet's order, of all 1,000 classes.

Validation images are the 400 of Tiny ImageNet that settings are chosen on. Test images are the
photographs of odd number, or for `tiny`, where none are given, 1,000 validation images of Tiny
ImageNet; `python -m experiments.pretrained` reads a network on all of them.
"""

import functools
import os
from pathlib import Path

import numpy as np

from ab_jax.data import Dataset, Images
from experiments.pretrained.imagenet_classes import class_ids
from experiments.pretrained.images import ImageSet, drawn
from experiments.pretrained.photographs import WHERE_FROM, Photographs
from experiments.pretrained.tiny_photographs import CALIBRATION, TinyPhotographs
from experiments.settings.datasets import DatasetFactory

PHOTOGRAPHS = "AB_JAX_PHOTOGRAPHS"
_SIZE = 224  # pixels
_TEST = 1000  # images of Tiny ImageNet

# Mean and deviation of pixels in 0 to 1 that make of them what a network was trained on.
_MINUS_ONE_TO_ONE = (0.5, 0.5)
_ABOUT_127 = (127 / 255, 128 / 255)


def _load(
    source: str,
    mean_and_deviation: tuple[float, float],
    *,
    data_dir: str | None,
    validation: int | None,
    image_size: int | None,
    classes: int | None,
) -> Dataset:
    """See the top of the file.

    Raises:
      ValueError: a flag that means nothing here, or photographs that are not given or that have no
        classes. FileNotFoundError: they, or Tiny ImageNet, are not there.
    """
    given = {"validation": validation, "image_size": image_size, "classes": classes}
    for flag, value in given.items():
        if value is not None:
            raise ValueError(
                f"--{flag}={value} is not for experiments.pretrained.training_images: which images "
                f"there are, and of which size, never changes. Omit it."
            )
    tiny = TinyPhotographs(_SIZE, data_dir)
    photographs = _photographs(needed=source != "tiny")
    train = []
    if source != "photographs":
        train.append(tiny.calibration(CALIBRATION))
    if photographs is not None and source != "tiny":
        train.append(photographs.calibration())
    if photographs is not None:
        test = photographs.test()
    else:
        of_tiny = tiny.test()
        assert of_tiny.labels is not None
        test = of_tiny[np.sort(drawn(of_tiny.labels, min(_TEST, len(of_tiny)), 0))]
    mean, deviation = mean_and_deviation
    return Dataset(
        name=f"experiments.pretrained.training_images:{source}",
        version="1",
        train=_mixed(_together(train)),
        validation=_together([tiny.choice()]),
        test=_together([test]),
        class_names=class_ids(),
        mean=(mean,) * 3,
        std=(deviation,) * 3,
    )


def _photographs(*, needed: bool) -> Photographs | None:
    """Those that the environment names; None: it names none."""
    if path := os.environ.get(PHOTOGRAPHS):
        return Photographs(Path(path), _SIZE)
    if needed:
        raise ValueError(f"The environment variable {PHOTOGRAPHS} names no images. {WHERE_FROM}.")
    return None


def _mixed(images: Images) -> Images:
    """The same images, the first ones of each source as often as all are: statistics want that."""
    order = drawn(np.zeros(len(images), np.int64), None, 0)
    return Images(images.images[order], images.labels[order])


def _together(sets: list[ImageSet]) -> Images:
    labels = []
    for images in sets:
        if images.labels is None:
            raise ValueError(
                f"The images that {PHOTOGRAPHS} names have no classes, and training needs them. "
                f"{WHERE_FROM}."
            )
        labels.append(images.labels)
    return Images(np.concatenate([images.pixels() for images in sets]), np.concatenate(labels))


tiny: DatasetFactory = functools.partial(_load, "tiny", _MINUS_ONE_TO_ONE)
photographs: DatasetFactory = functools.partial(_load, "photographs", _MINUS_ONE_TO_ONE)
both: DatasetFactory = functools.partial(_load, "both", _MINUS_ONE_TO_ONE)
efficientnet_tiny: DatasetFactory = functools.partial(_load, "tiny", _ABOUT_127)
efficientnet_photographs: DatasetFactory = functools.partial(_load, "photographs", _ABOUT_127)
efficientnet_both: DatasetFactory = functools.partial(_load, "both", _ABOUT_127)
