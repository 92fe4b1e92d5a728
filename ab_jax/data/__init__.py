"""Where images come from, and how they reach the device.

Importing this room loads NumPy and JAX; TFDS, scikit-learn and Pillow wait until they are needed,
and TensorFlow is needed by none of it but for preparing the official `cifar10`.
"""

from ab_jax.data.augment import augment, normalize
from ab_jax.data.batches import epoch_order, evaluation_batches, steps_per_epoch, train_indices
from ab_jax.data.dataset import Dataset, Images
from ab_jax.data.load import load

__all__ = [
    "Dataset",
    "Images",
    "augment",
    "epoch_order",
    "evaluation_batches",
    "load",
    "normalize",
    "steps_per_epoch",
    "train_indices",
]
