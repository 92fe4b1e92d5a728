"""The loop: what a run writes, that it repeats and resumes to the bit, and how it stops."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ab_jax as ab
from ab_jax.data import Dataset, Images
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.compiled_step import optimizer_of_state
from ab_jax.training.feeds import InMemory
from ab_jax.training.finite import NonFiniteLossError
from ab_jax.training.loop import train
from ab_jax.training.optimizers import OptimizerSettings, make_optimizer, warmup_cosine
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.records import RunDirectory
from ab_jax.training.retention import DamagedCheckpointWarning
from ab_jax.training.run_settings import Training
from ab_jax.training.seals import write_manifest
from ab_jax.training.state import TrainState, create_state
from ab_jax.training.stopping import StoppedError
from ab_jax.training.train_step import Preprocessing

BATCH, STEPS, EVAL_EVERY = 16, 12, 4  # four steps an epoch
RATE = warmup_cosine(0.2, 1, STEPS // 2)
RAMP = ab.cubic_ramp(2, 9)


@pytest.fixture(scope="module")
def training(
    request: pytest.FixtureRequest,
    model: nn.Module,
    rules: ab.Rules,
    preprocessing: Preprocessing,
    make_images: Callable[..., Images],
) -> Training:
    """Three epochs, with all that has a state: momentum, accumulation, augmentation, statistics."""
    rng = np.random.default_rng([request.config.getoption("seed"), 1])
    dataset = Dataset(
        name="random",
        version="1.0.0",
        train=make_images(rng, 4 * BATCH + 3),
        validation=make_images(rng, 21),
        test=make_images(rng, 21),
        class_names=tuple("abcde"),
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return Training(
        model=model,
        dataset=dataset,
        preprocessing=preprocessing,
        rules=rules,
        estimator=ab.alpha_blend,
        alpha=RAMP,
        optimizer=OptimizerSettings(name="sgd", weight_decay=1e-3, accumulate=2),
        learning_rate=RATE,
        batch_size=BATCH,
        steps=STEPS,
        eval_every=EVAL_EVERY,
        seed=int(rng.integers(2**31)),
        accumulate=2,
    )


def run(training: Training, path: Path, *, mode: Mode = "pmap", **changes: Any) -> dict[str, Any]:
    """Train on two devices in a directory; returns the record."""
    parallel = Parallel(mode, tuple(jax.devices()[:2]))
    with RunDirectory(path, experiment="tests", config={"name": path.name}) as directory:
        return train(dataclasses.replace(training, **changes), parallel, directory)


def last_state(training: Training, path: Path) -> TrainState:
    like = create_state(training.model, optimizer_of_state(training), (4, 4, 1), seed=0)
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.restore(like)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The metrics but for the speed, which no two runs share."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@dataclasses.dataclass(frozen=True)
class Finished:
    path: Path
    record: dict[str, Any]
    lines: list[dict[str, Any]]
    state: TrainState


@pytest.fixture(scope="module")
def finished(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing interrupted."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    record = run(training, path)
    return Finished(path, record, lines_of(path), last_state(training, path))


# What a run writes


def test_each_evaluation_is_a_line(finished: Finished) -> None:
    lines = finished.lines
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    np.testing.assert_allclose(
        [line["alpha"] for line in lines], [1 - (5 / 7) ** 3, 1 - (1 / 7) ** 3, 1], rtol=1e-6
    )
    assert [line["activation_alpha"] for line in lines] == [line["alpha"] for line in lines]
    # The rate of the update that the last batch belongs to: two batches each.
    assert [line["learning_rate"] for line in lines] == [float(RATE(i)) for i in (1, 3, 5)]
    readings = {
        f"{name}_{of}"
        for name in ("train", "blended", "quantized", "recalibrated")
        for of in ("loss", "accuracy")
    }
    expected = {"step", "epoch", "alpha", "activation_alpha", "learning_rate", "changed_codes"}
    expected |= readings
    for line in lines:
        assert set(line) == expected
        assert all(0 <= line[key] <= 1 for key in line if key.endswith(("accuracy", "codes")))
    assert finished.record["metrics"][0]["images_per_second"] > 0


@pytest.mark.long
def test_the_network_learns(training: Training, tmp_path: Path) -> None:
    record = run(
        training,
        tmp_path / "run",
        optimizer=make_optimizer("sgd", optax.constant_schedule(0.1)),
        estimator=ab.full_precision,
        alpha=optax.constant_schedule(0.0),
        steps=200,
        eval_every=40,
        read_test=False,
    )
    losses = [line["train_loss"] for line in record["metrics"]]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.long
def test_layers_follow_ramps_of_their_own(training: Training, tmp_path: Path) -> None:
    """The head's ramp begins where the convolution's ends; the lines tell the mean."""
    layers = ["conv/kernel", "head/kernel"]
    alpha = ab.layerwise_ramp(layers, 2, 10, ramp=ab.linear_ramp, paths=layers)
    record = run(training, tmp_path, alpha=alpha)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 12]
    for name in ("alpha", "activation_alpha"):
        np.testing.assert_allclose([line[name] for line in lines], [0.25, 0.75, 1.0], rtol=1e-6)
    assert lines[-1]["alpha"] == 1.0
    assert {float(alpha(STEPS)(layer)) for layer in layers} == {1.0}
    # At the end the network that was trained is the quantized one.
    for read in ("blended", "blended_recalibrated"):
        of_codes = read.replace("blended", "quantized")
        for part in ("validation", "test"):
            assert record["summary"][part][read] == record["summary"][part][of_codes]
    assert lines[-1]["blended_loss"] == lines[-1]["quantized_loss"]
    assert lines[1]["blended_loss"] != lines[1]["quantized_loss"]


def test_the_record_holds_lines_and_final_readings(finished: Finished) -> None:
    record = json.loads((finished.path / "record.json").read_text())
    assert record == finished.record
    lines = [
        {k: v for k, v in line.items() if k != "images_per_second"} for line in record["metrics"]
    ]
    assert lines == finished.lines
    summary = record["summary"]
    assert summary["steps"] == STEPS
    assert summary["seconds"] > 0
    assert len(summary["evaluation_seconds"]) == len(record["metrics"])
    assert 0 < min(summary["evaluation_seconds"]) <= sum(summary["evaluation_seconds"])
    assert sum(summary["evaluation_seconds"]) < summary["seconds"]
    # A 3x3 kernel, two vectors of the norm, a dense layer; a bit a weight and a scale a channel.
    conv, norm, head, bias = 9 * 3, 2 * 3, 4 * 4 * 3 * 5, 5
    assert summary["parameters"] == conv + norm + head + bias
    codes = math.ceil(conv / 8) + math.ceil(head / 8)
    packed = codes + 4 * (3 + 5) + 4 * (norm + bias)
    assert summary["bytes"] == {"trained": 4 * summary["parameters"], "packed": packed}
    assert summary["start"] is None
    names = {"blended", "blended_recalibrated", "quantized", "quantized_recalibrated"}
    assert set(summary["validation"]) == set(summary["test"]) == names
    # The last line and the summary read the same networks.
    assert summary["validation"]["quantized"] == lines[-1]["quantized_accuracy"]
    assert summary["validation"]["quantized_recalibrated"] == lines[-1]["recalibrated_accuracy"]
    # Alpha is 1 by now, so that the network as trained is the quantized one.
    assert summary["validation"]["blended"] == summary["validation"]["quantized"]


def test_train_metrics_are_means_since_the_last_evaluation(
    training: Training, finished: Finished, tmp_path: Path
) -> None:
    run(training, tmp_path / "often", eval_every=1, steps=4, read_test=False)
    often = lines_of(tmp_path / "often")
    for key in ("train_loss", "train_accuracy"):
        mean = np.mean([line[key] for line in often])
        assert finished.lines[0][key] == pytest.approx(mean, rel=1e-6)
    # Looking more often changes nothing.
    for key in ("quantized_loss", "blended_loss", "recalibrated_loss"):
        assert often[-1][key] == finished.lines[0][key]


# The same run again, whole or in parts


def test_the_same_seed_gives_the_same_run_traced_or_not(
    training: Training, finished: Finished, tmp_path: Path
) -> None:
    run(training, tmp_path / "again", profile=True)
    assert lines_of(tmp_path / "again") == finished.lines
    assert_same_bits(last_state(training, tmp_path / "again"), finished.state)
    traces = list((tmp_path / "again" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 0
    assert not (finished.path / "profile").exists()


def test_another_seed_gives_another_run(
    training: Training, finished: Finished, tmp_path: Path
) -> None:
    run(training, tmp_path / "other", seed=training.seed + 1)
    other = last_state(training, tmp_path / "other")
    for field in ("params", "key"):
        for a, b in zip(
            jax.tree.leaves(getattr(other, field)),
            jax.tree.leaves(getattr(finished.state, field)),
            strict=True,
        ):
            assert np.any(np.asarray(a) != np.asarray(b))
    assert lines_of(tmp_path / "other") != finished.lines


@pytest.mark.parametrize(
    ("cut", "when", "lines", "resumed_at"),
    [
        ((Checkpoints, "save"), "after", 2, 8),
        ((Checkpoints, "save"), "before", 2, 4),
        ((RunDirectory, "write_metrics"), "before", 1, 4),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    training: Training,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: tuple[type, str],
    when: str,
    lines: int,
    resumed_at: int,
) -> None:
    calls, whole = 0, getattr(*cut)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < 2 or when == "after":
            whole(*args, **kwargs)
        if calls == 2:
            raise KeyboardInterrupt

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(*cut, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(training, path)
    assert lines_of(path) == finished.lines[:lines]
    assert not (path / "record.json").exists()

    record = run(training, path)
    assert record["summary"]["resumed_at"] == resumed_at
    assert lines_of(path) == finished.lines
    assert_same_bits(last_state(training, path), finished.state)
    for part in ("validation", "test"):
        assert record["summary"][part] == finished.record["summary"][part]


def test_a_run_cut_off_after_its_last_step_needs_only_its_summary(
    training: Training, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "complete", lambda self, summary: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(training, path)
    record = run(training, path)
    assert record["summary"]["test"] == finished.record["summary"]["test"]
    assert lines_of(path) == finished.lines


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM while so many steps are about to be done."""
    whole = InMemory.training

    def training(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(whole(*args), start=args[3] + 1):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    patch.setattr(InMemory, "training", training)


@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=pytest.mark.long)])
def test_a_run_that_is_stopped_anywhere_ends_in_the_same_bits(
    training: Training,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    mode: Mode,
) -> None:
    """At an evaluation, between two, and twice in one interval."""
    if mode == "shard_map":
        run(training, tmp_path / "whole", mode=mode)
        whole = tmp_path / "whole"
    else:
        whole = finished.path
    expected, path = lines_of(whole), tmp_path / "run"
    stops = sorted({5, 7, int(rng.choice([1, 2, 3, 4])), int(rng.integers(8, STEPS))})
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(StoppedError, match=f"stopped at step {stop}, asked by SIGTERM"):
                run(training, path, mode=mode)
        assert lines_of(path) == expected[: stop // EVAL_EVERY]
        assert (path / "checkpoints" / str(stop) / "MANIFEST").exists()
    record = run(training, path, mode=mode)
    assert record["summary"]["resumed_at"] == stops[-1]
    assert lines_of(path) == expected
    assert_same_bits(last_state(training, path), last_state(training, whole))


@pytest.mark.long
def test_damage_between_two_parts_of_a_run_changes_nothing_in_its_end(
    training: Training, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "complete", lambda self, summary: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(training, path)
    (path / "checkpoints" / "12" / "about.json").write_text('{"accuracy": 1.0}')
    with pytest.warns(DamagedCheckpointWarning, match="12/about.json is not as it was written"):
        record = run(training, path)
    assert record["summary"]["resumed_at"] == 8
    assert lines_of(path) == finished.lines
    assert_same_bits(last_state(training, path), finished.state)


def test_the_last_ones_and_the_best_are_kept(training: Training, tmp_path: Path) -> None:
    run(training, tmp_path / "run", eval_every=1, read_test=False, keep_checkpoints=1)
    lines = lines_of(tmp_path / "run")
    best = max(lines, key=lambda line: (line["recalibrated_accuracy"], line["step"]))["step"]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {str(best), str(STEPS)}


# Starting from another run


def test_a_run_starts_from_the_weights_and_statistics_of_another(
    training: Training, finished: Finished, tmp_path: Path
) -> None:
    # A step that changes neither, so that what the run started from is what it ends with.
    frozen = dataclasses.replace(
        training,
        model=training.model.clone(batch_stats_momentum=1.0),
        optimizer=optax.set_to_zero(),
        steps=1,
        seed=training.seed + 1,
        init_from=finished.path,
        read_test=False,
    )
    summary = run(frozen, tmp_path / "next")["summary"]
    assert summary["start"] == finished.record["summary"]["validation"]
    state = last_state(frozen, tmp_path / "next")
    assert_same_bits(state.params, finished.state.params)
    assert_same_bits(state.model_state, finished.state.model_state)
    assert int(state.step) == 1
    assert np.any(state.key != finished.state.key)


def test_a_run_does_not_start_from_a_network_that_does_not_fit(
    training: Training, finished: Finished, tmp_path: Path
) -> None:
    wide = training.model.clone(features=7)
    with pytest.raises(ValueError, match=r"does not fit the model: .*norm/mean is \(3,\) there"):
        run(training, tmp_path / "next", model=wide, init_from=finished.path)


def test_a_missing_run_to_start_from_is_named(training: Training, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError, match="no run to start from") as error:
        run(training, tmp_path / "next", init_from=missing)
    assert f"in {missing}" in str(error.value)
    assert "--init_from" in str(error.value)


# How a run stops


def test_a_loss_that_is_not_finite_stops_the_run(training: Training, tmp_path: Path) -> None:
    explodes = optax.piecewise_constant_schedule(1e-3, {5: 1e36})
    with pytest.raises(NonFiniteLossError) as error:
        run(
            training,
            tmp_path / "run",
            optimizer=make_optimizer("sgd", explodes, accumulate=1),
            alpha=optax.constant_schedule(0.25),
            estimator=ab.soft_straight_through,
        )
    # The update of step 5 (counted from 0) is the first one that explodes, the loss of step 6 or 7
    # the first that shows it; the last checkpoint is that of the evaluation after four steps.
    message = str(error.value)
    assert any(f"at step {step}, at alpha 0.2500" in message for step in (6, 7)), message
    assert any(f"learning rate {float(RATE(step // 2)):.6g}" in message for step in (6, 7))
    assert "conv/kernel" in message
    assert f"Last checkpoint: step 4 ({tmp_path / 'run' / 'checkpoints' / '4'})" in message
    assert "Lower the learning rate" in message
    assert not (tmp_path / "run" / "record.json").exists()


def test_weights_that_are_not_finite_are_not_saved(training: Training, tmp_path: Path) -> None:
    # The loss of a step is that of the weights before its update: after the sixth it is finite yet.
    optimizer = make_optimizer("sgd", lambda count: jnp.where(count < 5, 1e-3, jnp.inf))
    with pytest.raises(NonFiniteLossError, match="Last checkpoint: step 5"):
        run(training, tmp_path / "run", optimizer=optimizer, eval_every=1)
    state = last_state(dataclasses.replace(training, optimizer=optimizer), tmp_path / "run")
    assert int(state.step) == 5
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps=0 and eval_every=4 must be at least 1"),
        ({"eval_every": 0}, r"steps=12 and eval_every=0 must be at least 1"),
        ({"batch_size": 15}, r"batch of 15 cannot be shared evenly by 2 devices"),
        ({"batch_size": 68}, r"batch_size=68 must lie between 1 and .*n=67"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(
    training: Training, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(training, tmp_path / "run", **changes)


# What a run finds that was cut off before its record


@pytest.fixture
def cut_off(finished: Finished, tmp_path: Path) -> Path:
    """A whole run but for its record."""
    path = shutil.copytree(finished.path, tmp_path / finished.path.name)
    (path / "record.json").unlink()
    return path


def test_changed_lines_and_flags_are_refused_before_anything_is_compiled(
    training: Training, cut_off: Path
) -> None:
    metrics, config = cut_off / "metrics.jsonl", cut_off / "config.json"
    lines = metrics.read_text().splitlines(True)
    for changed in ([], lines[:2], [lines[0], lines[2]], [lines[0], *lines]):
        metrics.write_text("".join(changed))
        with pytest.raises(ValueError, match=r"metrics\.jsonl was changed: line \d") as error:
            run(training, cut_off)
        assert f"remove {cut_off} to begin anew" in str(error.value)
    metrics.write_text("".join(lines))
    config.write_text(config.read_text().replace("cpu device", "tpu device"))
    with pytest.raises(ValueError, match=r"config\.json is not as it was written"):
        run(training, cut_off)
    config.unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        run(training, cut_off)
    assert not (cut_off / "record.json").exists()


def test_a_run_without_its_checkpoints_does_not_begin_anew_unseen(
    training: Training, cut_off: Path
) -> None:
    shutil.rmtree(cut_off / "checkpoints")
    with pytest.raises(ValueError, match=r"no checkpoint in .* but \d+ lines of metrics"):
        run(training, cut_off)


def test_a_renamed_checkpoint_is_refused_by_its_step(training: Training, cut_off: Path) -> None:
    """By its own note; and where older code made none, by its state."""
    checkpoints = cut_off / "checkpoints"
    for path in checkpoints.iterdir():
        if path.name != "12":
            shutil.rmtree(path)
    path = (checkpoints / "12").rename(checkpoints / "1012")
    with pytest.raises(ValueError, match=r"1012 is that of step 12"):
        run(training, cut_off)
    as_older_code_left_it(path)
    with pytest.raises(ValueError, match=r"1012 is the checkpoint of step 12. Give it that name"):
        run(training, cut_off)


def as_older_code_left_it(checkpoint: Path) -> None:
    """Without its step and what it seals of its run."""
    (checkpoint / "run.json").unlink()
    (checkpoint / "about.json").write_text('{"accuracy": 0.5}')
    (checkpoint / "MANIFEST").unlink()
    write_manifest(checkpoint)


def test_a_run_that_older_code_left_goes_on(
    training: Training, finished: Finished, cut_off: Path
) -> None:
    for path in (cut_off / "checkpoints").iterdir():
        as_older_code_left_it(path)
    (cut_off / "config.json.sha256").unlink()
    record = run(training, cut_off)
    assert record["metrics"] == finished.record["metrics"]
    assert record["summary"]["test"] == finished.record["summary"]["test"]


def test_a_ramp_that_would_run_backwards_is_refused(training: Training, cut_off: Path) -> None:
    """At step 12 alpha is 1 in both layers."""
    layers = ["conv/kernel", "head/kernel"]
    ramps: dict[str, tuple[Any, str]] = {
        "longer": (ab.cubic_ramp(2, 14), r"activations|conv/kernel"),
        "none": (optax.constant_schedule(0.0), r"activations|conv/kernel"),
        "layerwise": (ab.layerwise_ramp(layers, 2, 14, paths=layers), r"head/kernel"),
        "backward": (ab.layerwise_ramp(layers[::-1], 2, 14, paths=layers), r"conv/kernel"),
    }
    before = (cut_off / "metrics.jsonl").read_bytes()
    for alpha, name in ramps.values():
        with pytest.raises(ValueError, match="The ramp would run backwards: at step 12") as error:
            run(training, cut_off, alpha=alpha, steps=16)
        message = str(error.value)
        assert re.search(rf"the alpha of ({name}) is 1, with these flags it would fall", message)
        assert "--ramp_stop" in message
        assert "--init_from" in message
    activations = optax.constant_schedule(0.75)
    with pytest.raises(ValueError, match=r"alpha of activations is 1, .* would fall to 0\.75"):
        run(training, cut_off, activation_alpha=activations, steps=16)
    assert (cut_off / "metrics.jsonl").read_bytes() == before


def test_a_run_does_not_end_before_the_step_it_has_come_to(
    training: Training, cut_off: Path
) -> None:
    with pytest.raises(ValueError, match="has come to step 12, and with these flags it ends at 8"):
        run(training, cut_off, steps=8)
