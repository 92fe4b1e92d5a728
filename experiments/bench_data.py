"""How fast photographs come: streams as a ratio to the same work in plain OpenCV on the same core.

    python -m experiments.bench_data        (about two minutes)

The plain loop is the ceiling: files that are in memory already are decoded, cut and resized, with
the parts of the photographs drawn beforehand. A stream reads them from array_record, draws, puts
batches together and hands them over, here from a thread of this process or from one worker process.
Everything is bound to one core, so that the ratio is what all that costs; the loops take turns, and
the table gives the median over the rounds with its 95 % interval.

The photographs of `imagenet2012` are generated, in ImageNet's sizes, unless `--data_dir` names real
ones.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro

from ab_jax.data.dataset import Images
from ab_jax.data.jpeg import decode_photo, random_part
from ab_jax.data.prepared import source_of
from ab_jax.data.stream import Photos, load_stream
from ab_jax.training.records import describe_run, write_json
from experiments.generated_imagenet import prepare_generated_imagenet
from experiments.reporting.paired_statistics import median_interval

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
    rounds: int = 11  # measurements of each loop
    core: int = 0  # the core that everything runs on, where the system can bind it
    out: Path = Path("results/bench_data/imagenet2012.json")


def run(config: Config) -> dict[str, Any]:
    """Time the loops, write the record and return it."""
    c = config
    if min(c.rounds, c.batches, c.batch_size) < 1:
        raise ValueError(
            f"--rounds={c.rounds}, --batches={c.batches} and --batch_size={c.batch_size} must be "
            f"at least 1."
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {c.core})
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = c.data_dir
        if _is_generated(c.dataset, data_dir):
            data_dir = folder
            prepare_generated_imagenet(Path(folder), _GENERATED, 1, seed=0)
        seconds = _time(c, data_dir)
    flags = {**dataclasses.asdict(c), "out": str(c.out)}
    record = {**describe_run("experiments.bench_data", flags), "seconds": seconds}
    c.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(c.out, record)
    return record


def table(records: list[dict[str, Any]]) -> str:
    """The Markdown table of some records, a row each."""
    loops = list(records[0]["seconds"])
    lines = [f"| photographs | {' | '.join(loops)} |", f"| --- |{' ---: |' * len(loops)}"]
    for record in records:
        c = record["config"]
        generated = " (generated)" if _is_generated(c["dataset"], c["data_dir"]) else ""
        name = c["dataset"] + generated
        images = c["batch_size"] * c["batches"]
        plain, *others = (record["seconds"][loop] for loop in loops)
        cells = [f"1 ({images / statistics.median(plain):.0f} images/s)"]
        for seconds in others:
            ratios = [a / b for a, b in zip(plain, seconds, strict=True)]
            low, high = median_interval(ratios)
            cells.append(f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {name}, {c['image_size']} pixels | {' | '.join(cells)} |")
    first = records[0]
    rounds = ", ".join(str(len(record["seconds"][loops[0]])) for record in records)
    lines += [
        "",
        f"Images per second / plain OpenCV on the same core: median [95 % interval] over n = "
        f"{rounds} rounds; {first['hardware']}.",
    ]
    return "\n".join(lines)


def _is_generated(dataset: str, data_dir: str | None) -> bool:
    return dataset == "imagenet2012" and data_dir is None


def _time(config: Config, data_dir: str | None) -> dict[str, list[float]]:
    """Seconds for the batches of one measurement, by loop and round."""
    c = config
    loops: dict[str, Callable[[], float]] = {}
    streams = []
    for name, workers in {"plain OpenCV": None, "a thread": 0, "a worker": 1}.items():
        photos = load_stream(
            c.dataset,
            image_size=c.image_size,
            data_dir=data_dir,
            validation=0,
            workers=workers or 0,
        ).train
        if workers is None:
            loops[name] = _plain(c, photos)
            continue
        steps = (c.rounds + 1) * (_DRAINED + c.batches) + _DRAINED
        streams.append(photos.train_batches(0, c.batch_size, 0, steps))
        loops[name] = _streamed(c, streams[-1])
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(c.rounds + 1):
        for name, loop in loops.items():
            took = loop()
            if number:  # the first round warms up
                seconds[name].append(took)
            time.sleep(4 * took / c.batches)  # the stream fills its buffers, then rests
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
        started = time.perf_counter()
        for i, (file, (top, left, height, width)) in enumerate(zip(chosen, parts, strict=True)):
            image: Any = cv2.imdecode(np.frombuffer(file, np.uint8), flags)
            shrinks = min(height, width) >= c.image_size
            method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            part = image[top : top + height, left : left + width]
            resized = cv2.resize(part, size, interpolation=method)
            batch[i % c.batch_size] = cv2.flip(resized, 1) if flips[i] else resized
        return time.perf_counter() - started

    return loop


def _streamed(config: Config, stream: Iterator[Images]) -> Callable[[], float]:
    def loop() -> float:
        for _ in range(_DRAINED):  # what was made while the others were timed
            next(stream)
        started = time.perf_counter()
        for _ in range(config.batches):
            next(stream)
        return time.perf_counter() - started

    return loop


def main() -> None:
    """The command line; prints the table."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    try:
        print(table([run(config)]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
