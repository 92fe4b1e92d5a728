"""The data sets to train on: one record each. Somebody else's is --dataset=package.module:NAME.

What such a name stands for is a `DatasetFactory`; docs/extending.md shows one.
"""

import dataclasses
from typing import Any, Protocol

import jax

from ab_jax.data import Dataset, load
from ab_jax.data.stream import StreamedDataset, load_stream
from experiments.settings.choices import choose, is_elsewhere, load_elsewhere
from experiments.settings.config import Config, FlagError

STREAM_SIZE = 224  # pixels of a stream's crops, unless --image_size says otherwise


class DatasetFactory(Protocol):
    """What loads somebody else's images.

    It is called with the values of the flags of these names, None for one that is not given, and
    returns an `ab_jax.data.Dataset`: the same one for the same values. A value that means nothing
    to it should be refused, by a ValueError.
    """

    def __call__(
        self,
        *,
        data_dir: str | None,
        validation: int | None,
        image_size: int | None,
        classes: int | None,
    ) -> Dataset: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A data set by name.

    Attributes:
      label: its name in tables.
      origin: where the images come from, and how they are prepared.
      streamed: whether it never fits in memory, and is decoded as it is needed.
    """

    label: str
    origin: str
    streamed: bool = False


DATASETS: dict[str, Source] = {
    "digits": Source(
        label="scikit-learn's digits", origin="comes with scikit-learn; nothing to prepare"
    ),
    "cifar10": Source(
        label="CIFAR-10",
        origin="downloaded by TFDS: python -m ab_jax.data.prepare cifar10",
    ),
    "cifar10_jpeg": Source(
        label="CIFAR-10 (JPEG copy)",
        origin=(
            "all images of CIFAR-10 as split/class/NNNN.jpg: "
            "python -m ab_jax.data.prepare cifar10_jpeg --source=ARCHIVE"
        ),
    ),
    "tiny_imagenet": Source(
        label="Tiny ImageNet",
        origin="tiny-imagenet-200.zip: python -m ab_jax.data.prepare tiny_imagenet --source=ZIP",
    ),
    "imagenet2012": Source(
        label="ImageNet",
        origin="prepared by TFDS from the archives of image-net.org",
        streamed=True,
    ),
}


def label_of(name: str) -> str:
    """A data set's name in tables."""
    return DATASETS[name].label if name in DATASETS else name


def load_dataset(config: Config) -> Dataset | StreamedDataset:
    """The images that the flags ask for.

    Raises:
      FlagError: there is no such data set, or flags that do not go together. ValueError,
        FileNotFoundError: as `ab_jax.data.load` and `load_stream`.
    """
    c = config
    if not c.dataset.startswith("image_folder:"):
        if is_elsewhere(c.dataset):
            return _load_elsewhere(c)
        choose("dataset", c.dataset, {**DATASETS, "image_folder:NAME": None})
    streamed = c.dataset in DATASETS and DATASETS[c.dataset].streamed
    if not c.stream and not streamed:
        return load(
            c.dataset,
            data_dir=c.data_dir,
            validation=c.validation,
            image_size=c.image_size,
            classes=c.classes,
        )
    for flag, value in {"classes": c.classes, "pad": c.pad}.items():
        if value is not None:
            raise FlagError(f"--{flag}={value} is for images in memory, not for a stream. Omit it.")
    return load_stream(
        c.dataset,
        image_size=c.image_size or STREAM_SIZE,
        data_dir=c.data_dir,
        validation=c.validation,
        flip=c.flip,
        workers=c.workers,
        share=(jax.process_index(), jax.process_count()),
    )


def _load_elsewhere(config: Config) -> Dataset:
    c = config
    factory: Any = load_elsewhere("dataset", c.dataset)
    if not callable(factory):
        raise FlagError(
            f"--dataset={c.dataset} is {factory!r}: it should be a function that returns an "
            f"ab_jax.data.Dataset (see experiments.settings.datasets.DatasetFactory)."
        )
    if c.stream:
        raise FlagError(f"--stream: --dataset={c.dataset} is held in memory. Omit it.")
    dataset = factory(
        data_dir=c.data_dir,
        validation=c.validation,
        image_size=c.image_size,
        classes=c.classes,
    )
    if not isinstance(dataset, Dataset):
        raise FlagError(
            f"--dataset={c.dataset} returned a {type(dataset).__name__}, not an "
            f"ab_jax.data.Dataset."
        )
    return dataset
