"""Which images make up which batch: pure functions of the seed and the step.

Nothing here holds state, so a run that resumes needs the step alone to go on with the very batches
it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch number `epoch` visits `n` images.

    Args:
      seed: the run's seed, 0 or more.
      epoch: number of the epoch, from 0.
      n: number of images.

    Returns:
      int32 `[n]`, a permutation of `0 .. n-1`.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(n).astype(np.int32)


def steps_per_epoch(batch_size: int, n: int) -> int:
    """Number of whole batches in `n` images; the images left over wait for a later epoch.

    Raises:
      ValueError: `batch_size` is below 1 or above `n`.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size={batch_size} must lie between 1 and the number of training images, n={n}"
        )
    return n // batch_size


def train_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The training images of one step.

    Every batch is whole: the `n % batch_size` images at the end of an epoch's order are left out of
    that epoch. The order is a new one in each epoch, so no image is left out for good.

    Args:
      seed: the run's seed, 0 or more.
      step: number of the step, from 0.
      batch_size: images in a batch, over all devices.
      n: number of training images.

    Returns:
      int32 `[batch_size]`, indices into the training images.

    Raises:
      ValueError: `batch_size` is below 1 or above `n`.
    """
    epoch, batch = divmod(step, steps_per_epoch(batch_size, n))
    return epoch_order(seed, epoch, n)[batch * batch_size : (batch + 1) * batch_size]


def evaluation_batches(
    n: int, batch_size: int, devices: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape that visit each of `n` images exactly once, in order.

    Args:
      n: number of images.
      batch_size: images in a batch, over all devices; rounded up to a multiple of `devices`.
      devices: number of devices that share a batch.

    Yields:
      `(indices, mask)`, int32 `[B]` and bool `[B]`. The last batch is filled up with index 0, where
      the mask is False: count only images whose mask is True.

    Raises:
      ValueError: an argument is below 1 (`n` may be 0: no batches).
    """
    if n < 0 or batch_size < 1 or devices < 1:
        raise ValueError(
            f"n must be 0 or more, batch_size and devices 1 or more; "
            f"got n={n}, batch_size={batch_size}, devices={devices}"
        )
    return _evaluation_batches(n, -(-batch_size // devices) * devices)


def _evaluation_batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Apart from the check above, since a generator's body runs only at its first `next`.
    for start in range(0, n, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        mask = indices < n
        yield np.where(mask, indices, np.int32(0)), mask
