"""What a run says of its network, against the network and its codes written out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.data import Dataset, Images, augment
from ab_jax.training.accuracies import Readings
from ab_jax.training.evaluation import Evaluator
from ab_jax.training.parallel import Parallel
from ab_jax.training.state import TrainState
from ab_jax.training.train_step import Preprocessing

BATCH = 8
ALPHA = 0.375


@dataclasses.dataclass(frozen=True)
class Setting:
    """Readings of a data set, and what they should be of some parameters."""

    make: Callable[..., Readings]
    dataset: Dataset
    expected: Callable[..., tuple[float, float]]  # (params, stats or None for fresh, part)
    statistics: Any


@pytest.fixture
def setting(
    rng: np.random.Generator,
    devices: list[jax.Device],
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    variables: dict[str, Any],
    make_images: Callable[..., Images],
    forward: Callable[..., Any],
    loss_and_accuracy: Callable[..., tuple[float, float]],
) -> Setting:
    dataset = Dataset(
        name="random",
        version="1.0.0",
        train=make_images(rng, 20),
        validation=make_images(rng, 37),
        test=make_images(rng, 37),
        class_names=tuple("abcde"),
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    evaluator = Evaluator(model, preprocessing, Parallel("pmap", tuple(devices[:1])), BATCH)

    def make(**changes: Any) -> Readings:
        settings: Any = {"rules": rules, "estimator": ab.alpha_blend, **changes}
        return Readings(evaluator, settings.pop("dataset", dataset), **settings)

    def expected(params: Any, stats: Any, part: str) -> tuple[float, float]:
        if stats is None:
            # 20 training images: two whole batches, augmented always alike.
            images, positions = dataset.train.images, np.arange(20)
            seen = augment(jax.random.key(0), images, positions, pad=1, flip=True)
            measured = [forward(params, seen[i : i + BATCH])[1] for i in (0, BATCH)]
            mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *measured)
            stats = {"norm": mean}
        whole = dataset.parts[part]
        return loss_and_accuracy(forward(params, whole.images, stats)[0], whole.labels)

    return Setting(make, dataset, expected, variables["batch_stats"])


def state_of(variables: dict[str, Any]) -> TrainState:
    return TrainState(
        step=np.int32(0),
        params=variables["params"],
        model_state={"batch_stats": variables["batch_stats"]},
        opt_state=(),
        key=np.zeros(2, np.uint32),
    )


def perturbed(params: Any, rng: np.random.Generator) -> Any:
    return jax.tree.map(lambda w: (w + rng.normal(0, 0.5, w.shape)).astype(np.float32), params)


def test_metrics_are_readings_of_the_blended_and_of_the_quantized_network(
    setting: Setting, variables: dict[str, Any], binarize: Callable[[Any], Any]
) -> None:
    params = variables["params"]
    quantized = binarize(params)
    blended = jax.tree.map(lambda w, q: (1 - ALPHA) * w + ALPHA * q, params, quantized)
    metrics = setting.make().metrics(state_of(variables), ALPHA, ALPHA)
    for name, weights, stats in (
        ("blended", blended, setting.statistics),
        ("quantized", quantized, setting.statistics),
        ("recalibrated", quantized, None),
    ):
        loss, accuracy = setting.expected(weights, stats, "validation")
        assert metrics.pop(f"{name}_loss") == pytest.approx(loss, rel=1e-4)
        assert metrics.pop(f"{name}_accuracy") == pytest.approx(accuracy)
    assert metrics == {}  # no codes to compare with, nothing watched


def test_at_alpha_1_the_blended_network_is_the_quantized_one(
    setting: Setting, variables: dict[str, Any]
) -> None:
    metrics = setting.make().metrics(state_of(variables), 1.0, 1.0)
    assert metrics["blended_loss"] == metrics["quantized_loss"]
    assert metrics["blended_accuracy"] == metrics["quantized_accuracy"]


def test_changed_codes_are_the_share_of_weights_that_changed_sign(
    rng: np.random.Generator, setting: Setting, variables: dict[str, Any]
) -> None:
    empty = Images(np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int32))
    readings = setting.make(dataset=dataclasses.replace(setting.dataset, validation=empty))
    trees = [variables["params"]]
    trees += [perturbed(trees[0], rng) for _ in range(2)]
    kernels = [
        np.concatenate([np.ravel(params[layer]["kernel"]) for layer in ("conv", "head")])
        for params in trees
    ]
    readings.remember_codes(state_of({**variables, "params": trees[0]}))
    for before, after, params in zip(kernels[:-1], kernels[1:], trees[1:], strict=True):
        metrics = readings.metrics(state_of({**variables, "params": params}), ALPHA, ALPHA)
        expected = np.mean((before >= 0) != (after >= 0))
        assert 0 < expected < 1
        assert metrics == {"changed_codes": pytest.approx(expected)}  # no validation images


def test_summary_reads_four_networks_on_validation_and_test(
    setting: Setting, variables: dict[str, Any], binarize: Callable[[Any], Any]
) -> None:
    params = variables["params"]
    quantized = binarize(params)
    blended = jax.tree.map(lambda w, q: (1 - ALPHA) * w + ALPHA * q, params, quantized)
    summary = setting.make().summary(state_of(variables), ALPHA, ALPHA, [], read_test=True)
    networks = {
        "blended": (blended, setting.statistics),
        "blended_recalibrated": (blended, None),
        "quantized": (quantized, setting.statistics),
        "quantized_recalibrated": (quantized, None),
    }
    for part in ("validation", "test"):
        assert set(summary[part]) == set(networks)
        for name, network in networks.items():
            _, accuracy = setting.expected(*network, part)
            assert summary[part][name] == pytest.approx(accuracy)


def test_a_trial_does_not_look_at_the_test_set(setting: Setting, variables: dict[str, Any]) -> None:
    dataset = dataclasses.replace(setting.dataset)
    object.__setattr__(dataset, "test", None)  # touching it would fail
    summary = setting.make(dataset=dataset).summary(
        state_of(variables), ALPHA, ALPHA, [], read_test=False
    )
    assert summary["test"] is None
    assert summary["validation"] is not None


def test_histogram_counts_effective_weights_in_units_of_their_scale(
    setting: Setting, variables: dict[str, Any], binarize: Callable[[Any], Any]
) -> None:
    w = variables["params"]["conv"]["kernel"]
    scale = np.mean(np.abs(w), axis=(0, 1, 2))[None, None, None]
    q = np.where(w >= 0, scale, -scale)
    readings = setting.make(watch="conv/kernel")
    lines = []
    for step, alpha in enumerate((0.0, ALPHA, 1.0)):
        metrics = readings.metrics(state_of(variables), alpha, alpha)
        lines.append({"step": step, "alpha": alpha, **metrics})
    summary = readings.summary(state_of(variables), 1.0, 1.0, lines, read_test=False)["histograms"]
    assert summary["parameter"] == "conv/kernel"
    edges = np.asarray(summary["edges"])
    for frame, alpha in zip(summary["frames"], (0.0, ALPHA, 1.0), strict=True):
        relative = ((1 - alpha) * w + alpha * q) / scale
        assert frame["alpha"] == alpha
        counts = np.asarray(frame["counts"])
        assert counts.sum() == w.size
        # A weight on an edge may fall either way.
        for shift in (-1e-5, 1e-5):
            expected = np.histogram(np.clip(relative + shift, edges[0], edges[-1]), edges)[0]
            if np.array_equal(counts, expected):
                break
        else:
            np.testing.assert_array_equal(counts, expected)
    last = np.asarray(summary["frames"][-1]["counts"])
    middle = (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(middle[last > 0], [-1, 1], atol=1e-6)


@pytest.mark.parametrize("path", ["conv9/kernel", "norm/scale"])
def test_a_parameter_that_cannot_be_watched_is_named_at_once(
    setting: Setting, variables: dict[str, Any], path: str
) -> None:
    message = f"no quantized parameter '{path}' to watch; there are conv/kernel, head/kernel"
    with pytest.raises(ValueError, match=message):
        setting.make(watch=path).remember_codes(state_of(variables))
