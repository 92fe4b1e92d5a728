"""Evaluation: each image counts once, and re-estimated statistics are those of the batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.data import Images, augment
from ab_jax.training.evaluation import Evaluator, recalibrate_batch_stats
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.train_step import Preprocessing


@pytest.mark.parametrize(
    ("mode", "n_devices", "batch_size"),
    # 37 images: batches that leave a rest, hold exactly all, more than all; devices that do not
    # divide them.
    [("pmap", 1, 5), ("pmap", 1, 37), ("pmap", 4, 64), ("pmap", 8, 10), ("shard_map", 3, 16)],
)
def test_every_image_counts_once(
    devices: list[jax.Device],
    model: nn.Module,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
    forward: Callable[..., Any],
    loss_and_accuracy: Callable[..., tuple[float, float]],
    mode: Mode,
    n_devices: int,
    batch_size: int,
) -> None:
    params, stats = variables["params"], variables["batch_stats"]
    logits, _ = forward(params, images.images, stats)
    # Batches are filled up with the first image: where it is right, counting the filling shows.
    images.labels[0] = np.argmax(logits[0])
    parallel = Parallel(mode, tuple(devices[:n_devices]))
    evaluator = Evaluator(model, preprocessing, parallel, batch_size)
    reading = evaluator.read(params, {"batch_stats": stats}, 1.0, evaluator.place(images))
    loss, accuracy = loss_and_accuracy(logits, images.labels)
    assert reading.accuracy == pytest.approx(accuracy, abs=1e-9)
    assert reading.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "n_devices", "asked", "found"),
    [("pmap", 1, 3, 3), ("pmap", 4, 9, 4), ("shard_map", 4, 3, 3)],
)
def test_fresh_statistics_are_means_over_the_first_training_batches(
    devices: list[jax.Device],
    model: nn.Module,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
    forward: Callable[..., Any],
    mode: Mode,
    n_devices: int,
    asked: int,
    found: int,
) -> None:
    params, stats = variables["params"], variables["batch_stats"]
    before = jax.tree.map(np.copy, variables)
    evaluator = Evaluator(model, preprocessing, Parallel(mode, tuple(devices[:n_devices])), 8)
    placed = evaluator.place(images)
    fresh = evaluator.recalibrate(params, {"batch_stats": stats}, 1.0, placed, asked)
    jax.tree.map(np.testing.assert_array_equal, variables, before)

    # 37 images hold 4 whole batches of 8. They are cropped and flipped as in training, each image
    # always alike, whatever batch and device it falls to.
    seen = augment(jax.random.key(0), images.images, jnp.arange(len(images)), pad=1, flip=True)
    batches = [forward(params, seen[8 * i : 8 * (i + 1)])[1] for i in range(found)]
    for name in ("mean", "var"):
        expected = np.mean([measured[name] for measured in batches], axis=0)
        np.testing.assert_allclose(
            fresh["batch_stats"]["norm"][name], expected, rtol=1e-5, atol=1e-6
        )


def test_recalibration_mends_spoiled_statistics(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    images: Images,
    forward: Callable[..., Any],
) -> None:
    params = variables["params"]
    preprocessing = dataclasses.replace(preprocessing, pad=0, flip=False)
    # Labels that the network gives on the statistics of the batch: it is right where they hold.
    # Its logits have a mean of 0, or it might find one class everywhere, whatever the statistics.
    logits, _ = forward(params, images.images)
    head = {**params["head"], "bias": params["head"]["bias"] - np.mean(logits, axis=0)}
    params = {**params, "head": head}
    logits, _ = forward(params, images.images)
    images = Images(images.images, np.argmax(logits, axis=1).astype(np.int32))
    spoiled = {"norm": {"mean": np.full(3, 50.0, np.float32), "var": np.full(3, 1e4, np.float32)}}
    evaluator = Evaluator(model, preprocessing, Parallel("pmap", tuple(devices[:1])), len(images))
    placed = evaluator.place(images)
    broken = evaluator.read(params, {"batch_stats": spoiled}, 1.0, placed)
    fresh = evaluator.recalibrate(params, {"batch_stats": spoiled}, 1.0, placed, 1)
    mended = evaluator.read(params, fresh, 1.0, placed)
    assert mended.accuracy == 1.0
    assert broken.accuracy < 1.0


def test_the_mean_over_batches_leaves_its_inputs_alone(rng: np.random.Generator) -> None:
    measured = [{"a": rng.normal(size=3), "b": {"c": rng.normal(size=())}} for _ in range(5)]
    before = jax.tree.map(np.copy, measured)
    for count in (1, 5):
        mean = recalibrate_batch_stats(lambda i: measured[i], range(count))
        expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *measured[:count])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mean, expected
        )
    jax.tree.map(np.testing.assert_array_equal, measured, before)


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="no batches to estimate statistics from"):
        recalibrate_batch_stats(lambda batch: batch, [])
