"""What tells one copy of a data set from another, for the record of a run."""

from typing import Any

from ab_jax.data.dataset import Dataset
from ab_jax.data.stream import StreamedDataset


def facts(dataset: Dataset | StreamedDataset) -> dict[str, Any]:
    """Name, version, numbers of images and classes, shape and channels' mean, as JSON values.

    The mean of images in memory is that of the very training images, so that it tells other images
    under the same version; of a stream it is a constant. It is rounded, since its last digits are
    the processor's.
    """
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {
        "name": dataset.name,
        "version": dataset.version,
        "images": {name: len(part) for name, part in parts.items()},
        "classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        "mean": [round(mean, 6) for mean in dataset.mean],
    }
