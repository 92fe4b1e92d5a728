"""Streams in training: the same steps as images in memory, and a run that goes on where it was."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import ab_jax as ab
from ab_jax.data import Images
from ab_jax.data.prepare import prepare_image_folder
from ab_jax.data.stream import StreamedDataset, load_stream
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.feeds import InMemory, Streamed
from ab_jax.training.loop import train
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.parallel import AXIS, Mode, Parallel
from ab_jax.training.records import RunDirectory
from ab_jax.training.run_settings import Training
from ab_jax.training.train_step import Preprocessing

BATCH = 8


class Net(nn.Module):
    batch_stats_momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, alpha: Any = 1.0) -> jax.Array:
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(images)
        momentum = self.batch_stats_momentum
        x = nn.BatchNorm(not train, momentum=momentum, axis_name=AXIS, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StreamedDataset:
    directory = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in {"train": 14, "val": 5}.items():
        for class_name, least in {"dark": 0, "light": 60}.items():
            for index in range(count):
                pixels = rng.integers(least, least + 190, (12, 14, 3)).astype(np.uint8)
                path = directory / "source" / split / class_name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    prepare_image_folder(directory / "source", "photos", directory / "data")
    return load_stream(
        "image_folder:photos", image_size=6, data_dir=directory / "data", validation=5
    )


@pytest.fixture
def run(dataset: StreamedDataset, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    schedule = optax.constant_schedule(0.1)
    optimizer = make_optimizer("sgd", schedule)

    def start(parallel: Parallel, name: str, alpha: optax.Schedule | None = None) -> dict[str, Any]:
        training = Training(
            model=Net(),
            dataset=dataset,
            preprocessing=Preprocessing(mean=dataset.mean, std=dataset.std),
            rules=ab.Rules([(r".*kernel", ab.Uniform(bits=4)), (r".*", None)]),
            estimator=ab.alpha_blend,
            alpha=alpha or ab.cubic_ramp(0, 6),
            optimizer=optimizer,
            learning_rate=schedule,
            batch_size=BATCH,
            steps=7,
            eval_every=2,
            seed=3,
        )
        with RunDirectory(tmp_path / name, experiment="test", config={}) as directory:
            record = train(training, parallel, directory)
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            assert checkpoints.latest_step == 7
        return record

    return start


def lines_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    without = {"images_per_second"}
    return [{k: v for k, v in line.items() if k not in without} for line in record["metrics"]]


@pytest.mark.long
@pytest.mark.parametrize(("mode", "n"), [("shard_map", 1), ("pmap", 2), ("shard_map", 4)])
def test_devices_change_nothing_in_a_streamed_run(
    run: Callable[..., dict[str, Any]], devices: list[jax.Device], mode: Mode, n: int
) -> None:
    one = run(Parallel("pmap", tuple(devices[:1])), "one")
    several = run(Parallel(mode, tuple(devices[:n])), "several")
    assert len(lines_of(one)) == 4
    for a, b in zip(lines_of(one), lines_of(several), strict=True):
        assert a.keys() == b.keys()
        for key in ("train_loss", "blended_loss", "recalibrated_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-3)


def test_a_run_that_was_cut_off_ends_in_the_same_metrics(
    run: Callable[..., dict[str, Any]], devices: list[jax.Device]
) -> None:
    parallel = Parallel("pmap", tuple(devices[:1]))
    whole = run(parallel, "whole")
    ramp = ab.cubic_ramp(0, 6)

    def cut(step: Any) -> Any:
        if isinstance(step, int) and step > 4:  # the loop asks for the line of step 6
            raise KeyboardInterrupt
        return ramp(step)

    with pytest.raises(KeyboardInterrupt):
        run(parallel, "resumed", cut)
    resumed = run(parallel, "resumed")
    assert resumed["summary"]["resumed_at"] == 4
    assert lines_of(resumed) == lines_of(whole)
    assert resumed["summary"]["test"] == whole["summary"]["test"]


@pytest.mark.parametrize(("mode", "n"), [("pmap", 1), ("pmap", 4), ("shard_map", 2)])
def test_both_feeds_hand_a_step_the_images_of_its_batch(
    dataset: StreamedDataset, devices: list[jax.Device], mode: Mode, n: int
) -> None:
    parallel = Parallel(mode, tuple(devices[:n]))
    centers = next(images for images, _ in dataset.train.evaluation_batches(len(dataset.train)))
    memory = InMemory(centers, parallel)
    stream = Streamed(dataset.train, parallel)

    def of(feed: Any) -> Callable[..., Any]:
        flags = [feed.sharded, feed.sharded, True, True]

        def step(images: jax.Array, labels: jax.Array, indices: jax.Array, last: jax.Array) -> Any:
            chosen = jnp.where(last[:, None, None, None], images[indices], 0).astype(jnp.int32)
            weighted = jnp.sum(chosen * (1 + labels[indices])[:, None, None, None])
            return jax.lax.psum(weighted, AXIS)

        return parallel.wrap(step, flags)

    sums = []
    for feed in (memory, stream):
        assert len(feed) == 23
        found = [parallel.unreplicate(of(feed)(*batch)) for batch in feed.evaluation(BATCH)]
        sums.append([int(value) for value in found])
    assert len(sums[0]) == 3
    assert sums[0] == sums[1]
    expected = centers.images.astype(int) * (1 + centers.labels)[:, None, None, None]
    assert sum(sums[0]) == expected.sum()

    def labels(images: Any, labels: jax.Array, indices: jax.Array, positions: jax.Array) -> Any:
        del images
        placed = jnp.zeros(BATCH, jnp.int32).at[positions].add(labels[indices])
        return jax.lax.psum(placed, AXIS)

    drawn = []
    for feed in (memory, stream):
        step = parallel.wrap(labels, [feed.sharded, feed.sharded, True, True])
        batches = feed.training(5, BATCH, 1, 4)
        drawn.append([np.asarray(parallel.unreplicate(step(*b))).tolist() for b in batches])
    assert len(drawn[0]) == 3
    assert drawn[0] == drawn[1]
    assert isinstance(centers, Images)
