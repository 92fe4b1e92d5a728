"""Photographs that are decoded as they are needed, for data sets that do not fit in memory.

Grain reads, decodes and crops in worker processes; what makes up a batch is a pure function of the
seed and the step, as for images in memory (`ab_jax.data.batches`). So a stream can start at any
step, and the step in a checkpoint is its position.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ab_jax.data.batches import epoch_order, evaluation_batches, steps_per_epoch
from ab_jax.data.dataset import Images
from ab_jax.data.jpeg import center_crop, decode_photo, random_resized_crop
from ab_jax.data.parts import cut
from ab_jax.data.prepared import (
    class_names_of,
    damage_named,
    open_prepared,
    resolve_data_dir,
    source_of,
)

# Of ImageNet's training images, as everywhere; pixels in 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MOST_VALIDATION = 10_000  # images, unless asked for more
_BATCHES_AHEAD = 2  # a worker holds so many; one of 256 images of 224 pixels has 39 MB


@dataclasses.dataclass(frozen=True)
class Photos:
    """The encoded images of one part of a prepared data set.

    Attributes:
      directory: of the prepared version, such as `DATA_DIR/imagenet2012/5.1.0`.
      split: TFDS's name of the split.
      start, stop: which of its records.
      image_size: height and width to crop and resize to, in pixels.
      flip: whether training images are mirrored at random.
      workers: processes that decode; 0: a thread of this one.
      share: `(i, n)` for the i-th of n processes, each of which reads its share of every batch.
      upright: whether photographs are turned as their files note.
    """

    directory: Path
    split: str
    start: int
    stop: int
    image_size: int
    flip: bool = True
    workers: int = 0
    share: tuple[int, int] = (0, 1)
    upright: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Decoded images, uint8 `[H, W, 3]`, and their labels, one by one.

        Raises:
          ValueError: one is damaged; names the file, the record and the split.
        """
        records = [self.start + int(index) for index in indices]
        with damage_named(self.directory):
            examples = source_of(self.directory, self.split).__getitems__(records)
        for record, example in zip(records, examples, strict=True):
            file = example.get("file_name", example.get("id", b"?")).decode()
            name = f"{file} (record {record} of {self.split} in {self.directory})"
            photograph = decode_photo(example["image"], name, upright=self.upright)
            yield photograph, int(example["label"])

    def train_batches(
        self, seed: int, batch_size: int, first_step: int, steps: int
    ) -> Iterator[Images]:
        """The batches of steps `first_step` to `steps - 1`; random parts of the photographs.

        The indices are those of `train_indices`; an image's crop depends on the seed and on its
        place in the run alone, not on workers, shares or where the stream started.

        Args:
          seed: the run's.
          batch_size: images in a global batch.
          first_step, steps: from where, and to where.

        Yields:
          This process's share of each batch.

        Raises:
          ValueError: as `read`, or a batch that the processes cannot share evenly.
        """
        make = _TrainBatch(self, seed, batch_size, self._share(batch_size), first_step)
        return _stream(make, max(0, steps - first_step), self.workers)

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[Images, np.ndarray]]:
        """Every photograph once, in order: its center.

        Yields:
          This process's share of each batch with a mask, bool `[B]`; where it is False the batch
          was filled up.

        Raises:
          ValueError: as `train_batches`.
        """
        mine = self._share(batch_size)
        chunks = [
            (indices[mine], mask[mine])
            for indices, mask in evaluation_batches(len(self), batch_size)
        ]
        make = _EvaluationBatch(self, [indices for indices, _ in chunks])
        batches = _stream(make, len(chunks), self.workers)
        for images, (_, mask) in zip(batches, chunks, strict=True):
            yield images, mask

    def centers(self, indices: Sequence[int] | np.ndarray) -> Images:
        """These photographs in this order, the center of each: the same in every process.

        Raises:
          ValueError: as `read`.
        """
        return self._batch(
            np.asarray(indices), lambda i, photograph, square: center_crop(photograph, square)
        )

    def _share(self, batch_size: int) -> slice:
        """The places in a global batch that are this process's."""
        process, processes = self.share
        if batch_size % processes:
            raise ValueError(
                f"A batch of {batch_size} images cannot be shared evenly by {processes} "
                f"processes. Choose a batch size that is a multiple of {processes}."
            )
        local = batch_size // processes
        return slice(process * local, (process + 1) * local)

    def _batch(
        self, indices: np.ndarray, cut: Callable[[int, np.ndarray, np.ndarray], None]
    ) -> Images:
        """Photographs as a batch; `cut(i, photograph, square)` fills the i-th square of it."""
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for i, (photograph, labels[i]) in enumerate(self.read(indices)):
            cut(i, photograph, images[i])
        return Images(images, labels)


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """From the number of a batch in this process's stream to its images."""

    photos: Photos
    seed: int
    batch_size: int
    places: slice
    first_step: int

    def __call__(self, number: int) -> Images:
        step = self.first_step + number
        epoch, batch = divmod(step, steps_per_epoch(self.batch_size, len(self.photos)))
        order = _order(self.seed, epoch, len(self.photos))
        chosen = order[batch * self.batch_size :][: self.batch_size][self.places]

        def cut(i: int, photograph: np.ndarray, square: np.ndarray) -> None:
            position = step * self.batch_size + self.places.start + i
            sequence = np.random.SeedSequence([self.seed, position])
            generator = np.random.Generator(np.random.PCG64(sequence))
            random_resized_crop(photograph, square, generator, flip=self.photos.flip)

        return self.photos._batch(chosen, cut)


@dataclasses.dataclass(frozen=True)
class _EvaluationBatch:
    """The same for an evaluation."""

    photos: Photos
    indices: list[np.ndarray]

    def __call__(self, number: int) -> Images:
        return self.photos.centers(self.indices[number])


@functools.lru_cache(maxsize=2)  # an epoch and the next: workers run ahead
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return epoch_order(seed, epoch, n)


def _stream(make: Callable[[int], Images], count: int, workers: int) -> Iterator[Images]:
    """The batches `make(0)`, `make(1)`, ..., in order, made ahead of their use.

    A batch is made as a whole: image by image, Grain's own steps and a copy of each image into its
    batch took half the time of a thread at 64 pixels, and a twentieth at 224.
    """
    import grain
    from absl import flags

    made = grain.MapDataset.range(count).map(make)
    # Grain's own default would hold 500 batches.
    # Two threads are slower than one on the same core, and more cores are what workers are for.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
    if not workers:
        return iter(made.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks absl for flags, which ours is no program of
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    processes = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=_BATCHES_AHEAD
    )
    return iter(made.to_iter_dataset(options).mp_prefetch(processes, _one_thread))


def _one_thread(worker: int, workers: int) -> None:
    del worker, workers
    import cv2

    cv2.setNumThreads(1)  # the workers are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that was killed cannot end its workers, which would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """A data set in its three parts, on disk; otherwise like `ab_jax.data.Dataset`.

    Attributes:
      name, version, class_names: as there.
      train, validation, test: the parts.
      mean, std: those of ImageNet's training images.
    """

    name: str
    version: str
    train: Photos
    validation: Photos
    test: Photos
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, `(H, W, C)`."""
        return self.train.image_size, self.train.image_size, 3


def load_stream(
    name: str,
    *,
    image_size: int,
    data_dir: Path | str | None = None,
    validation: int | None = None,
    flip: bool = True,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> StreamedDataset:
    """A prepared data set as a stream: `imagenet2012`, as TFDS prepares it, or any other.

    The parts are cut as `ab_jax.data.load` cuts them (`ab_jax.data.parts`); ImageNet's own test
    images have no labels and are left out. A rotation noted in a file is heeded, but in ImageNet.

    Args:
      name: `imagenet2012`, `tiny_imagenet` or `image_folder:NAME`.
      image_size: height and width of the batches' images, in pixels.
      data_dir: where the prepared data lie; default `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.
      validation: number of training images to cut off for validation. Default: a tenth of them,
        10,000 at most.
      flip, workers, share: see `Photos`.

    Raises:
      FileNotFoundError: it is not prepared; the message says how to.
      ValueError: it is prepared in a format that needs TensorFlow, or damaged; an `image_size` or
        `workers` that makes no sense, or a `validation` that leaves no training image or that a
        data set with splits of its own has no use for.
    """
    if image_size < 1 or workers < 0:
        raise ValueError(
            f"image_size={image_size} must be at least 1 pixel and workers={workers} at least 0"
        )
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"share={share} must be (i, n) with 0 <= i < n")
    builder = open_prepared(name, resolve_data_dir(data_dir))
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    imagenet = name == "imagenet2012"
    if imagenet:
        sizes.pop("test", None)
    photos = functools.partial(
        Photos, Path(builder.data_dir), image_size=image_size, flip=flip, workers=workers
    )
    photos = functools.partial(photos, share=share, upright=not imagenet)
    default = min(sizes.get("train", 0) // 10, _MOST_VALIDATION)
    train, validation_part, test = (
        photos(split=part.split, start=part.start, stop=part.stop)
        for part in cut(name, sizes, validation, default)
    )
    return StreamedDataset(
        name=name,
        version=str(builder.version),
        train=train,
        validation=validation_part,
        test=test,
        class_names=class_names_of(builder),
    )
