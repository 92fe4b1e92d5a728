"""How fast photographs come: streams as a ratio to the same work in plain OpenCV on the same core.

    python -m benchmarks.loading        (about two minutes)

The plain loop is the ceiling: files that are in memory already are decoded, cut and resized, with
the parts of the photographs drawn beforehand. A stream reads them from array_record, draws, puts
batches together and hands them over, here from a thread of this process or from one worker process.
Everything is bound to one core, so that the ratio is what all that costs; the loops take turns
(`benchmarks.measuring.ratios`).

The photographs of `imagenet2012` are generated, in ImageNet's sizes, unless `--data_dir` names real
ones.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ab_jax.data.dataset import Images
from ab_jax.data.jpeg import decode_photo, random_part
from ab_jax.data.prepared import source_of
from ab_jax.data.stream import Photos, load_stream
from benchmarks.measuring.benchmark_command import Record, main, recorded, require_at_least_one
from benchmarks.measuring.generated_imagenet import prepare_generated_imagenet
from benchmarks.measuring.ratios import in_rounds, markdown, over_rounds, ratio_cells, timed

_GENERATED = 256  # photographs
_DRAINED = 8  # batches: more than a stream makes ahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to read, and where to write the record."""

    dataset: str = "imagenet2012"  # imagenet2012, tiny_imagenet or image_folder:NAME
    # Where it lies prepared; None: $TFDS_DATA_DIR or TFDS's default, imagenet2012 is generated.
    data_dir: str | None = None
    image_size: int = 224  # pixels
    batch_size: int = 32  # images
    batches: int = 6  # in each measurement
    rounds: int = 11  # measurements of each loop, after a round to warm up
    seed: int = 0  # of the order in which a round runs the loops
    core: int = 0  # the core that everything runs on, where the system can bind it
    out: Path = Path("results/bench_data/imagenet2012.json")


@recorded("benchmarks.loading")
def run(config: Config) -> Record:
    """Time the loops."""
    c = config
    require_at_least_one(c, "rounds", "batches", "batch_size")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {c.core})
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = c.data_dir
        if _is_generated(c.dataset, data_dir):
            data_dir = folder
            prepare_generated_imagenet(Path(folder), _GENERATED, 1, seed=0)
        return {"seconds": _time(c, data_dir)}


def table(records: Sequence[Record]) -> str:
    """The Markdown table of some records, a row each."""
    rows = []
    for record in records:
        c = record["config"]
        images = c["batch_size"] * c["batches"]
        speeds = {
            loop: [images / seconds for seconds in times]
            for loop, times in record["seconds"].items()
        }
        cells = ratio_cells(speeds, lambda speed: f"{speed:.0f} images/s", digits=2)
        generated = " (generated)" if _is_generated(c["dataset"], c["data_dir"]) else ""
        rows.append([f"{c['dataset']}{generated}, {c['image_size']} pixels", *cells.values()])
    caption = (
        f"Images per second / plain OpenCV on the same core: {over_rounds(records)}; "
        f"{records[0]['hardware']}."
    )
    return f"{markdown(['photographs', *records[0]['seconds']], rows)}\n\n{caption}"


def _is_generated(dataset: str, data_dir: str | None) -> bool:
    return dataset == "imagenet2012" and data_dir is None


def _time(config: Config, data_dir: str | None) -> dict[str, list[float]]:
    """Seconds for the batches of one measurement, by loop and round."""
    c = config

    def photos(workers: int) -> Photos:
        data = load_stream(
            c.dataset, image_size=c.image_size, data_dir=data_dir, validation=0, workers=workers
        )
        return data.train

    loops = {"plain OpenCV": _plain(c, photos(0))}
    steps = (c.rounds + 1) * (_DRAINED + c.batches) + _DRAINED
    streams = [photos(workers).train_batches(0, c.batch_size, 0, steps) for workers in (0, 1)]
    for name, stream in zip(("a thread", "a worker"), streams, strict=True):
        loops[name] = _streamed(c, stream)
    seconds = in_rounds(loops, rounds=c.rounds, seed=c.seed)
    for stream in streams:
        for _ in stream:  # a stream that is left in the middle leaves its worker behind
            pass
    return seconds


def _plain(config: Config, photos: Photos) -> Callable[[], float]:
    c = config
    source = source_of(photos.directory, photos.split)
    files = [source[photos.start + i]["image"] for i in range(min(len(photos), _GENERATED))]
    rng = np.random.default_rng(0)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION

    def loop() -> float:
        count = c.batch_size * c.batches
        chosen = [files[i] for i in rng.integers(len(files), size=count)]
        photographs = [decode_photo(file, c.dataset) for file in chosen]
        parts = [random_part(image.shape[0], image.shape[1], rng) for image in photographs]
        del photographs
        flips = rng.random(count) < 0.5
        batch = np.empty((c.batch_size, c.image_size, c.image_size, 3), np.uint8)
        size = (c.image_size, c.image_size)

        def fill() -> None:
            for i, (file, (top, left, height, width)) in enumerate(zip(chosen, parts, strict=True)):
                image: Any = cv2.imdecode(np.frombuffer(file, np.uint8), flags)
                shrinks = min(height, width) >= c.image_size
                method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
                part = image[top : top + height, left : left + width]
                resized = cv2.resize(part, size, interpolation=method)
                batch[i % c.batch_size] = cv2.flip(resized, 1) if flips[i] else resized

        return timed(fill).wall

    return loop


def _streamed(config: Config, stream: Iterator[Images]) -> Callable[[], float]:
    def take(batches: int) -> None:
        for _ in range(batches):
            next(stream)

    def loop() -> float:
        take(_DRAINED)  # what was made while the others were timed
        took = timed(lambda: take(config.batches)).wall
        time.sleep(4 * took / config.batches)  # it fills its buffers, then rests
        return took

    return loop


if __name__ == "__main__":
    main(Config, run, table, __doc__)
