"""Flags of short training: what is refused before anything is written, and small runs of it."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.calibration import calibrate
from ab_jax.training.checkpoint import Checkpoints
from experiments import train
from experiments.exported.finished_networks import read_run
from experiments.settings.build import make_model, settled
from experiments.settings.config import Config, FlagError
from experiments.settings.datasets import load_dataset
from experiments.settings.levels import weight_rules
from experiments.settings.starts import CALIBRATIONS, OF_LAST_PHASE
from tests.fast_compilation import FAST_COMPILATION
from tests.two_processes import SECONDS, numbers, pair, record_of

HERE = "tests.experiments.test_starts"


class Small(nn.Module):
    """conv - norm - relu - mean - dense, for --network."""

    num_classes: int
    axis_name: str | None = None
    batch_stats_momentum: float = 0.9

    @nn.compact
    def __call__(self, images: Any, *, train: bool) -> Any:
        x = nn.Conv(8, (3, 3), 2, use_bias=False, name="stem")(images)
        momentum, axis = self.batch_stats_momentum, self.axis_name
        x = nn.BatchNorm(not train, momentum=momentum, axis_name=axis, name="stem_norm")(x)
        return nn.Dense(self.num_classes, name="head")(nn.relu(x).mean((1, 2)))


def no_rule(w: Any, quantizer: Any, alpha: Any) -> Any:
    """An estimator that fits for itself."""
    return w


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A float phase of two steps, and two steps at 3 bits."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    return Config(
        network=f"{HERE}:Small",
        dataset="digits",
        validation=1397 - 128,
        weights="int3",
        epochs=1.0,
        float_epochs=1.0,
        batch_size=64,
        warmup=0.0,
        runs_dir=str(tmp_path / "runs"),
        compilation_cache="",
    )


ALL: dict[str, Any] = {
    "teacher": "start",
    "teacher_share": 0.5,
    "relative_updates": True,
    "rebase_norm": True,
    "calibrate": "gptq",
    "calibration_images": 24,
}


def test_these_flags_are_for_the_last_phase_alone(tiny: Config) -> None:
    config = dataclasses.replace(tiny, **ALL, latents="codes")
    assert OF_LAST_PHASE.keys() == {*ALL, "latents"}
    last = train.last_phase(config)
    assert {flag: getattr(last, flag) for flag in ALL} == ALL
    record = train.run(config)
    assert record["config"]["teacher"] == "start"
    assert len(record["summary"]["teacher"]) == 64
    before = read_run(Path(config.runs_dir) / "run" / "float", network=config.network)
    assert {f: before.description["config"][f] for f in OF_LAST_PHASE} == OF_LAST_PHASE
    assert "scales" not in before.description
    found = read_run(Path(config.runs_dir) / "run", network=config.network)
    assert found.description["scales"] == "calibrated"


@pytest.mark.parametrize("method", ["ste", "ab", "parq", "lsq"])
def test_the_exported_scales_are_those_of_the_calibration_unless_they_are_trained(
    tiny: Config, method: str
) -> None:
    config = dataclasses.replace(
        tiny, method=method, calibrate="rounding", calibration_images=24, ramp_stop=0.5
    )
    train.run(config)
    found = read_run(Path(config.runs_dir) / "run", network=config.network)
    dataset = load_dataset(config)
    with Checkpoints(Path(config.runs_dir) / "run" / "float" / "checkpoints") as checkpoints:
        start = checkpoints.network()
    model = make_model(config, num_classes=dataset.num_classes, image_size=8)
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([0, 0])))
    images = dataset.train.images[order.permutation(128)[:24]]
    x = (images / np.float32(255) - np.float32(dataset.mean)) / np.float32(dataset.std)

    def forward(params: Any, x: Any) -> Any:
        return model.apply({"params": params, **start["model_state"]}, x, train=False)

    wanted = calibrate(
        forward,
        start["params"],
        weight_rules(config),
        [(jnp.asarray(x, jnp.float32),)],
        method=CALIBRATIONS["rounding"](),
    )
    scales = ab.scales_of(wanted.codes)
    assert len(scales) == 2
    for path, scale in ab.scales_of(found.variables["params"]).items():
        close = np.isclose(scale, scales[path], rtol=1e-5, atol=0)
        assert not np.any(close) if method == "lsq" else np.all(close)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher": "start"}, r"--teacher=start is for a run that starts .* --init_from"),
        (
            {"rebase_norm": True},
            r"--rebase_norm is for a run .*--float_epochs, or omit --rebase_no",
        ),
        (
            {"calibrate": "gptq"},
            r"--calibrate=gptq is for a run that starts from a trained network",
        ),
        (
            {"calibrate": "gptq", "float_epochs": 1.0, "method": "float"},
            r"--calibrate=gptq is for a run that starts from a trained network",
        ),
        ({"teacher_share": 0.5}, r"--teacher_share=0\.5 is for --teacher: give that"),
        ({"calibration_images": 64}, r"--calibration_images=64 is for --calibrate: give that"),
        ({"latents": "codes"}, r"--latents=codes is for --calibrate: give that, or omit it"),
        (
            {"teacher": "start", "init_from": "x", "new_head": True},
            r"--teacher=start: with --new_head",
        ),
        (
            {"calibrate": "best", "init_from": "x"},
            r"--calibrate=best is not known\. Choose one of coordinate_descent, gptq, adaround",
        ),
        (
            {"calibrate": "gptq", "init_from": "x", "refit_every": 4},
            r"--calibrate=gptq .* --refit_every=4 fits others\. Omit one",
        ),
        (
            {"calibrate": "gptq", "init_from": "x", "method": "float"},
            r"--calibrate=gptq: --method=float takes no scales",
        ),
        (
            {"calibrate": "gptq", "init_from": "x", "method": f"{HERE}:no_rule"},
            r"--method=tests\S+:no_rule takes no scales\. Choose another method",
        ),
        (
            {"calibrate": "gptq", "init_from": "x", "weights": "int4", "weight_zero_point": True},
            r"which --weight_zero_point does not have",
        ),
        *(
            (
                {"calibrate": "gptq", "init_from": "x", "weights": weights, **more},
                rf"which --weights={weights} --weight_scale=\w+ does not have",
            )
            for weights, more in (
                ("least_squares_binary2", {}),
                ("binary", {"weight_scale": "one"}),
            )
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        settled(Config(**flags))


def test_a_teacher_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = Config(dataset="digits", teacher=str(tmp_path / "x"), runs_dir=str(tmp_path))
    with pytest.raises(FlagError, match=r"no network to learn from in .*x\. .*correct --teacher"):
        train.run(config)
    assert list(tmp_path.iterdir()) == []


def test_more_images_than_there_are_cannot_calibrate(tiny: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny, init_from=str(tmp_path), calibrate="gptq", calibration_images=129
    )
    with pytest.raises(FlagError, match=re.escape("--calibration_images=129 is more than the 128")):
        train.run(config)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_two_processes_start_and_train_as_one(
    tiny: Config,
    tmp_path: Path,
    free_port: int,
    start_together: Callable[..., Any],
    wait_for_all: Callable[..., None],
    mode: Any,
) -> None:
    config = dataclasses.replace(tiny, **ALL, optimizer="adamw", learning_rate=0.01, parallel=mode)
    alone = train.run(dataclasses.replace(config, name="alone"))
    flags = {f: v for f, v in dataclasses.asdict(config).items() if v != getattr(Config(), f)}
    words = [sys.executable, "-m", "experiments.train"]
    words += [f"--{flag}" if v is True else f"--{flag}={v}" for flag, v in flags.items()]
    wait_for_all(start_together(pair(words, free_port), 1, FAST_COMPILATION), SECONDS)
    together = record_of(Path(config.runs_dir) / "run")
    for line, other in zip(numbers(together), numbers(alone), strict=True):
        for name in ("step", "alpha", "train_loss", "blended_loss"):
            assert line[name] == pytest.approx(other[name], rel=1e-3)
