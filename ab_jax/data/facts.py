"""What the record of a run tells of its data, and what tells one copy of them from another."""

from typing import Any

from ab_jax.data.dataset import Dataset
from ab_jax.data.stream import StreamedDataset


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
