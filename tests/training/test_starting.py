"""Runs of a network that is trained already: calibrated, re-based, taught, resumed to the bit."""

import dataclasses
import functools
import os
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
from ab_jax.calibration import Gptq, Rounding, calibrate
from ab_jax.data import Dataset, Images
from ab_jax.data.batches import epoch_order
from ab_jax.models.mobilenet import MobileNet
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.distillation import digest
from ab_jax.training.feeds import InMemory
from ab_jax.training.loop import train
from ab_jax.training.optimizers import make_optimizer
from ab_jax.training.parallel import Mode, Parallel
from ab_jax.training.rebasing import rebased
from ab_jax.training.records import RunDirectory
from ab_jax.training.run_settings import Training
from ab_jax.training.starting import (
    CalibratedStart,
    calibrated,
    drawn_images,
    load_teacher,
    network_from,
    with_rebased_norm,
)
from ab_jax.training.state import create_state
from ab_jax.training.stopping import StoppedError
from ab_jax.training.train_step import Preprocessing

BATCH = 16
SHAPE = (4, 4, 1)
RULES = ab.Rules([("conv/kernel", ab.Uniform(bits=3)), ("head/.*l", ab.Ternary()), (".*", None)])
RESTING = make_optimizer("sgd", optax.constant_schedule(0.0))
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def training(
    request: pytest.FixtureRequest,
    model: nn.Module,
    preprocessing: Preprocessing,
    make_images: Callable[..., Images],
) -> Training:
    rng = np.random.default_rng([request.config.getoption("seed"), 3])
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
    rate = optax.constant_schedule(0.05)
    return Training(
        model=model,
        dataset=dataset,
        preprocessing=preprocessing,
        rules=RULES,
        estimator=ab.at_fixed_scales(ab.alpha_blend),
        alpha=ab.cubic_ramp(1, 5),
        optimizer=make_optimizer("sgd", rate, weight_decay=1e-3, accumulate=2, relative=True),
        learning_rate=rate,
        batch_size=BATCH,
        steps=8,
        eval_every=4,
        seed=int(rng.integers(2**31)),
        accumulate=2,
    )


@pytest.fixture(scope="module")
def start(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float run that has a checkpoint, with statistics that are not those of its images."""
    path = tmp_path_factory.mktemp("float")
    state = create_state(training.model, RESTING, SHAPE, training.seed + 1)
    statistics = {"norm": {"mean": jnp.float32([0.5, -1, 0]), "var": jnp.float32([2, 0.5, 1])}}
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(dataclasses.replace(state, model_state={"batch_stats": statistics}))
    return path


@pytest.fixture
def run(training: Training, start: Path, tmp_path: Path) -> Run:
    """Trains from the start on two devices in a directory; returns the record."""

    def run(name: str, mode: Mode = "pmap", **changes: Any) -> dict[str, Any]:
        t = dataclasses.replace(training, **{"init_from": start, **changes})
        path, parallel = tmp_path / name, Parallel(mode, tuple(jax.devices()[:2]))
        with RunDirectory(path, experiment="tests", config={"name": name}) as directory:
            return train(t, parallel, directory)

    return run


def stored(path: Path) -> dict[str, Any]:
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.network()


def bits(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def codes_of(network: dict[str, Any]) -> Any:
    """What is exported, as `experiments.exported.finished_networks.read_run` has it."""
    return ab.quantize(network["params"], RULES, scales=network["scales"])


def by_hand(training: Training, start: Path, method: Any, count: int) -> Any:
    """The calibration of the start."""
    variables = load_teacher(start, training.model, SHAPE)
    model, params = training.model, variables.pop("params")
    drawn = drawn_images(training.dataset.train, count, training.seed)
    x = training.preprocessing.normalize(jnp.asarray(drawn))

    def forward(params: Any, x: Any) -> Any:
        return model.apply({"params": params, **variables}, x, train=False)

    return calibrate(forward, params, RULES, [(x,)], method=method)


def test_images_are_those_that_a_run_sees_first(training: Training) -> None:
    images = training.dataset.train
    found = drawn_images(images, 5, seed=3)
    np.testing.assert_array_equal(found, images.images[epoch_order(3, 0, len(images))[:5]])
    with pytest.raises(ValueError, match=r"67 training images, and 68 .*--calibration_images"):
        drawn_images(images, 68, seed=3)


# Calibrated starts


@pytest.mark.parametrize("method", [ab.straight_through, ab.alpha_blend, ab.parq])
def test_codes_that_do_not_move_are_those_of_the_calibration(
    training: Training, start: Path, run: Run, tmp_path: Path, method: Any
) -> None:
    calibration = CalibratedStart(method=Gptq(), images=24, latents="codes")
    record = run(
        "codes",
        calibration=calibration,
        optimizer=RESTING,
        estimator=ab.at_fixed_scales(method),
        steps=2,
        eval_every=1,
        alpha=optax.constant_schedule(1.0),
    )
    wanted = by_hand(training, start, Gptq(), 24)
    found = stored(tmp_path / "codes")
    assert bits(jax.tree.map(jnp.asarray, codes_of(found))) == bits(wanted.codes)
    assert all(line["changed_codes"] == 0 for line in record["metrics"])
    for line in record["metrics"]:
        assert line["blended_loss"] == line["quantized_loss"]


def test_corrected_latents_are_rounded_to_the_codes_of_the_calibration(
    training: Training, start: Path, run: Run, tmp_path: Path
) -> None:
    """Which are not all the nearest ones, as those of GPTQ are not."""
    calibration = CalibratedStart(method=Gptq(), images=24)
    run("corrected", calibration=calibration, optimizer=RESTING, steps=1)
    wanted = by_hand(training, start, Gptq(), 24)
    found = stored(tmp_path / "corrected")
    assert bits(jax.tree.map(jnp.asarray, found["params"])) == bits(wanted.latents)
    nearest = ab.quantize(wanted.params, RULES, scales=ab.scales_of(wanted.codes))
    codes, differ = codes_of(found), 0
    for layer in ("conv", "head"):
        for name in ("scale", "codes"):
            of = [getattr(tree[layer]["kernel"], name) for tree in (codes, wanted.codes)]
            np.testing.assert_array_equal(*of)
        differ += np.sum(nearest[layer]["kernel"].codes != wanted.codes[layer]["kernel"].codes)
    assert differ > 0


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_scales_stay_in_training_but_for_an_estimator_that_trains_them(
    training: Training, start: Path, run: Run, tmp_path: Path, mode: Mode
) -> None:
    calibration = CalibratedStart(method=Gptq(), images=24)
    wanted = ab.scales_of(by_hand(training, start, Gptq(), 24).codes)
    methods = {"ab": ab.at_fixed_scales(ab.alpha_blend), "lsq": ab.learned_step_size}
    if mode == "pmap":
        methods |= {f.__name__: ab.at_fixed_scales(f) for f in (ab.straight_through, ab.parq)}
    adam = make_optimizer("adamw", optax.constant_schedule(0.01), relative=True)
    for name, estimator in methods.items():
        run(name, mode, calibration=calibration, estimator=estimator, optimizer=adam, steps=4)
        found = stored(tmp_path / name)
        codes = codes_of(found)
        for path, scale in wanted.items():
            layer = path.partition("/")[0]
            same = np.asarray(codes[layer]["kernel"].scale) == np.asarray(scale)
            assert np.all(same) if name != "lsq" else not np.any(same), name
        first = by_hand(training, start, Gptq(), 24).latents
        assert bits(found["params"]) != bits(jax.tree.map(np.asarray, first))


def test_a_rebased_start_is_calibrated_as_it_is(
    training: Training, start: Path, run: Run, tmp_path: Path
) -> None:
    run("rebased", rebase_norm=True, optimizer=RESTING, steps=1, estimator=ab.straight_through)
    variables = load_teacher(start, training.model, SHAPE)
    x = training.preprocessing.normalize(jnp.asarray(training.dataset.train.images))
    wanted = rebased(training.model, variables, [x], train=False)
    found = stored(tmp_path / "rebased")
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        *(found["params"], wanted["params"]),
    )
    # A step later than the start, at a momentum of 0.9, statistics have hardly moved.
    statistics = found["model_state"]["batch_stats"]["norm"], wanted["batch_stats"]["norm"]
    assert np.all(np.abs(statistics[0]["mean"] - statistics[1]["mean"]) < 0.1)


@pytest.mark.parametrize("latents", ["corrected", "codes"])
def test_the_calibrated_network_is_rebased_and_not_the_float_one(
    training: Training, start: Path, latents: Any
) -> None:
    """Its function stays, and its norms have the statistics of their own inputs."""
    t, by = training, CalibratedStart(method=Gptq(), images=24, latents=latents)
    images = t.model, t.preprocessing, t.dataset.train, t.seed
    state = network_from(start, create_state(t.model, RESTING, SHAPE, 0, scale_rules=RULES))
    before = calibrated(state, *images, rules=RULES, start=by)
    after = with_rebased_norm(before, *images, calibrated_by=RULES)
    for layer in ("conv", "head"):
        kernels = [of.params[layer]["kernel"] for of in (before, after)]
        np.testing.assert_array_equal(*kernels)
    x = t.preprocessing.normalize(jnp.asarray(t.dataset.train.images))
    variables = [
        {"params": ab.dequantize(ab.quantize(of.params, RULES, scales=of.scales)), **of.model_state}
        for of in (before, after)
    ]
    logits = [t.model.apply(of, x, train=False) for of in variables]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    again = rebased(t.model, variables[1], [x], train=False)
    for name in ("mean", "var"):
        found, wanted = (of["batch_stats"]["norm"][name] for of in (variables[1], again))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    in_float = with_rebased_norm(before, *images).model_state["batch_stats"]["norm"]
    if latents == "corrected":
        assert not np.allclose(in_float["var"], again["batch_stats"]["norm"]["var"], rtol=1e-3)


# Resuming


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_a_run_with_all_of_it_goes_on_to_the_same_bits(
    training: Training,
    run: Run,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: Mode,
) -> None:
    flags: dict[str, Any] = {
        "mode": mode,
        "rebase_norm": True,
        "calibration": CalibratedStart(method=Gptq(), images=24),
        "teacher": start,
        "teacher_share": 0.8,
    }
    record = run("whole", **flags)
    whole = InMemory.training

    def stopping(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(whole(*args), start=args[3] + 1):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(InMemory, "training", stopping)
        with pytest.raises(StoppedError, match="stopped at step 5"):
            run("cut", **flags)
    again = run("cut", **flags)
    assert again["summary"]["resumed_at"] == 5
    for name in ("validation", "test", "teacher"):
        assert again["summary"][name] == record["summary"][name]
    like = create_state(training.model, training.optimizer, SHAPE, seed=0, scale_rules=RULES)
    states = []
    for name in ("whole", "cut"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            states.append(checkpoints.restore(like))
        items = [
            path for path in (tmp_path / name / "checkpoints" / "8").iterdir() if path.is_dir()
        ]
        assert {path.name for path in items} == {"network", "rest", "scales"}, "and no teacher"
    assert bits(states[0]) == bits(states[1])
    # What updates are relative to is that of the calibrated start, and no longer the weights'.
    sizes = states[0].opt_state.sizes
    assert bits(sizes.scales) == bits(states[0].scales)
    kernel = np.asarray(states[0].params["conv"]["kernel"])
    of_channel = np.sqrt((kernel**2).mean((0, 1, 2), keepdims=True))
    assert np.all(np.asarray(sizes.params["conv"]["kernel"]) != of_channel)


def test_another_teacher_is_noticed(
    training: Training, run: Run, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = create_state(training.model, RESTING, SHAPE, training.seed + 2)
    with Checkpoints(tmp_path / "other" / "checkpoints") as checkpoints:
        checkpoints.save(other)
    flags: dict[str, Any] = {"init_from": None, "estimator": ab.straight_through, "eval_every": 2}
    record = run("taught", teacher=start, steps=2, **flags)
    assert record["summary"]["teacher"] == digest(load_teacher(start, training.model, SHAPE))
    (tmp_path / "taught" / "record.json").unlink()
    with pytest.raises(ValueError, match=r"The teacher in .*other is another .*--allow_changed"):
        run("taught", teacher=tmp_path / "other", steps=4, **flags)
    assert run("taught", teacher=start, steps=4, **flags)["summary"]["resumed_at"] == 2


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None, "rebase_norm": True}, "for a network that is trained .*--init_from"),
        ({"estimator": ab.alpha_blend}, "needs an estimator that takes its scales"),
    ],
)
def test_starts_that_cannot_be_are_refused(run: Run, changes: dict[str, Any], message: str) -> None:
    calibration = CalibratedStart(method=Gptq(), images=24)
    with pytest.raises(ValueError, match=message):
        run("refused", **{"calibration": calibration, **changes})


def test_a_teacher_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"in .*none: .*correct --teacher"):
        run("refused", teacher=tmp_path / "none")


@pytest.mark.long
def test_every_layer_of_a_network_with_convolutions_for_cpus_is_calibrated(
    preprocessing: Preprocessing, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MobileNet(5, width=1 / 32, stem=32)
    rules = ab.Rules([(r"(.*/)?kernel", ab.Uniform(bits=4)), (".*", None)])
    state = create_state(model, RESTING, (8, 8, 1), seed=0)
    images = Images(np.tile(training.dataset.train.images, (1, 2, 2, 1)), np.zeros(67, np.int32))
    start = CalibratedStart(method=Rounding(), images=8)
    found = calibrated(state, model, preprocessing, images, 0, rules=rules, start=start)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ab.quantized_paths(state.params, rules)) == 28
    assert not any("(" in line for line in lines), "and nothing stands against one"
    assert found.scales is not None
    assert found.scales.keys() == set(ab.quantized_paths(state.params, rules))
