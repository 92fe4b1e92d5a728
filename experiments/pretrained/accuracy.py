"""How many images of a set a network names right."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.pretrained.images import ImageSet


def accuracy(
    logits: Callable[[np.ndarray], Any], images: ImageSet, *, batch_size: int = 32
) -> float:
    """Percent of images whose label has the largest logit of the classes that the set has.

    Args:
      logits: of uint8 pixels `[batch_size, size, size, 3]` returns `[batch_size, 1000]`.
      images: with labels.
      batch_size: always as many are asked for, so that `logits` is compiled once.

    Raises:
      ValueError: images without labels.
    """
    if images.labels is None:
        raise ValueError("There is no accuracy of images without labels.")
    named = []
    for pixels in images.batches(batch_size):
        missing = batch_size - len(pixels)
        filled = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        found = np.asarray(logits(filled))[: len(pixels)]
        if images.classes is None:
            named.append(found.argmax(-1))
        else:
            named.append(images.classes[found[:, images.classes].argmax(-1)])
    return 100 * float(np.mean(np.concatenate(named) == images.labels))
