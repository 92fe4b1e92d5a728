"""scikit-learn's handwritten digits, which every guide trains on: 8 x 8 pixels, 10 classes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

TEST_IMAGES = 400

Images = tuple[jax.Array, jax.Array]


def load() -> tuple[Images, Images]:
    """The training and the test part: float32 images [N, 8, 8, 1] in [0, 1], int32 labels [N]."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray(digits.images[order, ..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target[order], jnp.int32)
    test, train = slice(TEST_IMAGES), slice(TEST_IMAGES, None)
    return (images[train], labels[train]), (images[test], labels[test])


def batches(train: Images, steps: int, seed: int, size: int = 64) -> Iterator[Images]:
    """So many batches, drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        drawn = rng.integers(len(train[1]), size=size)
        yield train[0][drawn], train[1][drawn]
