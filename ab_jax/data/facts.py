"""What tells one copy of a data set from another, for the record of a run."""

from typing import Any

from ab_jax.data.dataset import Dataset
from ab_jax.data.stream import StreamedDataset


def facts(dataset: Dataset | StreamedDataset) -> dict[str, Any]:
    """Name, version, number of images of each part, and mean of the channels, as JSON values.

    The mean of images in memory is that of the very training images, so that it tells other images
    under the same version; of a stream it is a constant. It is rounded, since its last digits are
    the processor's.
    """
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {
        "name": dataset.name,
        "version": dataset.version,
        "images": {name: len(part) for name, part in parts.items()},
        "mean": [round(mean, 6) for mean in dataset.mean],
    }
