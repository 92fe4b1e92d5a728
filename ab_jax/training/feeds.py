"""How images reach the steps: from the memory of the devices, or batch by batch from a stream.

A step takes images and labels with indices into them. In memory these are the whole part, placed on
every device once; from a stream they are each device's share of one batch, and its indices count
that share. So there is one step for both.

With several processes each of them holds or decodes what its own devices take, and nothing more.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from ab_jax.data.batches import epoch_order, evaluation_batches, steps_per_epoch
from ab_jax.data.dataset import Images
from ab_jax.data.stream import Photos
from ab_jax.training.parallel import Parallel

# What a step is given of a batch, on the devices: images and labels, then indices and what else it
# takes for each image.
Batch = tuple[Any, ...]

_BATCHES_AHEAD = 2  # on their way to the devices while a step computes


class Feed(Protocol):
    """One part of a data set, as the steps of a run take it.

    Attributes:
      sharded: whether `images` and `labels` of its batches are shared out over the devices.
    """

    sharded: bool

    def __len__(self) -> int: ...

    def training(self, seed: int, batch_size: int, first_step: int, steps: int) -> Iterator[Batch]:
        """`(images, labels, indices, positions)` of steps `first_step` to `steps - 1`."""
        ...

    def chunks(self, seed: int, batch_size: int, spans: Iterable[range]) -> Iterator[Batch]:
        """As `training`, for the steps of a span at a time, with indices [batch, steps]."""
        ...

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """`(images, labels, indices, mask)`: every image once."""
        ...

    def calibration(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """`(images, indices)`: always the same training images, `batches` times at most."""
        ...


class InMemory:
    """Images that lie on every device, picked by index.

    Args:
      images: the part.
      parallel: the devices.
    """

    sharded = False

    def __init__(self, images: Images, parallel: Parallel) -> None:
        self._n = len(images)
        self._parallel = parallel
        self._placed = parallel.place((images.images, images.labels))

    def __len__(self) -> int:
        return self._n

    def training(self, seed: int, batch_size: int, first_step: int, steps: int) -> Iterator[Batch]:
        """See `Feed`."""
        draws = self._draws(seed, batch_size)
        positions = self._parallel.shard(np.arange(batch_size, dtype=np.int32))
        for step in range(first_step, steps):
            yield *self._placed, self._parallel.shard(draws(step)), positions

    def chunks(self, seed: int, batch_size: int, spans: Iterable[range]) -> Iterator[Batch]:
        """See `Feed`."""
        draws = self._draws(seed, batch_size)
        positions = self._parallel.shard(np.arange(batch_size, dtype=np.int32))
        for span in spans:
            indices = np.stack([draws(step) for step in span], axis=1)
            yield *self._placed, self._parallel.shard(indices), positions

    def _draws(self, seed: int, batch_size: int) -> Callable[[int], np.ndarray]:
        """The indices of a step."""
        per_epoch = steps_per_epoch(batch_size, self._n)
        order = functools.lru_cache(maxsize=2)(lambda epoch: epoch_order(seed, epoch, self._n))

        def indices(step: int) -> np.ndarray:
            epoch, batch = divmod(step, per_epoch)
            found: np.ndarray = order(epoch)[batch * batch_size :][:batch_size]
            return found

        return indices

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """See `Feed`."""
        for batch in evaluation_batches(self._n, batch_size, len(self._parallel.devices)):
            yield *self._placed, *self._parallel.shard(batch)

    def calibration(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """See `Feed`."""
        shares = len(self._parallel.devices)
        size = max(min(batch_size, self._n) // shares, 1) * shares
        images, _ = self._placed
        for start in range(0, min(batches, self._n // size) * size, size):
            yield images, self._parallel.shard(np.arange(start, start + size, dtype=np.int32))


class Streamed:
    """Photographs that are decoded as they are needed.

    Args:
      photos: the part; with several processes it decodes this one's share of it.
      parallel: the devices.

    Raises:
      ValueError: a share that is not that of the devices.
    """

    sharded = True

    def __init__(self, photos: Photos, parallel: Parallel) -> None:
        if photos.share != parallel.share:
            raise ValueError(
                f"The stream decodes share {photos.share} of each batch, but the devices of this "
                f"process take share {parallel.share}. Load it with share={parallel.share}."
            )
        self._photos = photos
        self._parallel = parallel

    def __len__(self) -> int:
        return len(self._photos)

    def training(self, seed: int, batch_size: int, first_step: int, steps: int) -> Iterator[Batch]:
        """See `Feed`."""
        positions = self._parallel.shard(np.arange(batch_size, dtype=np.int32))
        stream = self._photos.train_batches(seed, batch_size, first_step, steps)
        return _ahead((*self._placed(images), positions) for images in stream)

    def chunks(self, seed: int, batch_size: int, spans: Iterable[range]) -> Iterator[Batch]:
        """See `Feed`.

        Raises:
          ValueError: always: the photographs of several steps are not placed at once.
        """
        raise ValueError("Photographs of a stream come step by step: steps_per_call must be 1.")

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """See `Feed`."""
        shares = len(self._parallel.devices)
        size = -(-batch_size // shares) * shares
        return _ahead(
            (*self._placed(images), self._parallel.shard_own(mask))
            for images, mask in self._photos.evaluation_batches(size)
        )

    def calibration(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """See `Feed`."""
        shares = len(self._parallel.devices)
        size = max(min(batch_size, len(self._photos)) // shares, 1) * shares
        count = min(batches, len(self._photos) // size)
        for batch in self._photos.train_batches(0, size, 0, count):
            images, _, indices = self._placed(batch)
            yield images, indices

    def _placed(self, batch: Images) -> Batch:
        """This process's share of a batch; each device counts its own images from 0."""
        devices = len(self._parallel.devices) // self._parallel.share[1]
        indices = np.tile(np.arange(len(batch) // devices, dtype=np.int32), devices)
        return self._parallel.shard_own((batch.images, batch.labels, indices))


def make_feed(part: Images | Photos, parallel: Parallel) -> Feed:
    """The feed that fits a part of a data set."""
    return InMemory(part, parallel) if isinstance(part, Images) else Streamed(part, parallel)


def _ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, a few of them placed before they are asked for."""
    queue: collections.deque[Batch] = collections.deque()
    for batch in batches:
        queue.append(batch)
        if len(queue) > _BATCHES_AHEAD:
            yield queue.popleft()
    yield from queue
