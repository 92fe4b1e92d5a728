"""The experiment: its flags and their errors at the command line, and small runs of each method."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ab_jax.data import load
from ab_jax.export.packed import read_packed
from ab_jax.linen import RANGES
from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.feeds import InMemory
from experiments import binarynet_cifar10, export, train
from experiments.exported.finished_networks import load_packed
from experiments.settings.build import make_model, settled
from experiments.settings.config import FREE_FLAGS, PLACES, Config, recorded
from experiments.settings.levels import activation_rules
from experiments.settings.methods import alpha_schedule, method_of
from tests.fast_compilation import fast_compilation

__all__ = ["fast_compilation"]
pytestmark = pytest.mark.usefixtures("fast_compilation")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A compilation cache of this file's own; `run` sets JAX's for good."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield str(tmp_path_factory.mktemp("cache"))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Config:
    """Two epochs of two steps each, on 128 digits."""
    return Config(
        dataset="digits",
        validation=1397 - 128,
        activation="sign",
        width=1 / 32,
        epochs=2.0,
        batch_size=64,
        warmup=0.0,
        eval_every=0.5,
        flip=False,
        watch="conv3/kernel",
        runs_dir=str(tmp_path_factory.mktemp("runs")),
        compilation_cache=cache,
    )


@pytest.fixture(scope="module")
def first_losses() -> dict[str, float]:
    """The loss of the first step by method."""
    return {}


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to be parallel; eight simulated ones on a few cores mostly wait for each other."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)


# Small runs


@pytest.mark.long
@pytest.mark.parametrize("method", ["float", "ste", "ab", "lsq"])
def test_each_method_runs_to_its_record(
    tiny: Config, first_losses: dict[str, float], method: Any
) -> None:
    config = dataclasses.replace(tiny, method=method, ramp_stop=0.75, name=f"digits/{method}")
    record = train.run(config, "experiments.binarynet_cifar10")
    directory = Path(tiny.runs_dir) / "digits" / method
    assert json.loads((directory / "record.json").read_text()) == record
    assert record["experiment"] == "experiments.binarynet_cifar10"
    assert record["config"] == recorded(settled(config))

    lines, summary = record["metrics"], record["summary"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    ramp = [1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3, 1, 1]  # from step 0 to step 3
    alphas = {"float": [0] * 4, "ste": [1] * 4, "lsq": [1] * 4}.get(method, ramp)
    np.testing.assert_allclose([line["alpha"] for line in lines], alphas, rtol=1e-6)
    # With alpha 1 the network as trained is the one of the codes.
    for line, alpha in zip(lines, alphas, strict=True):
        assert (line["blended_loss"] == line["quantized_loss"]) == (alpha == 1)
    for part in ("validation", "test"):
        accuracies = summary[part]
        same = accuracies["blended"] == accuracies["quantized"]
        assert same or method == "float"
        assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())

    histograms = summary["histograms"]
    assert histograms["parameter"] == "conv3/kernel"
    assert [frame["step"] for frame in histograms["frames"]] == [1, 2, 3, 4]
    for frame, alpha in zip(histograms["frames"], alphas, strict=True):
        counts = np.asarray(frame["counts"])
        assert counts.sum() == 3 * 3 * 8 * 8
        levels = np.count_nonzero(counts)
        assert levels == 2 if alpha == 1 else levels > 2

    # Runs of one seed are paired: same weights, same images. What differs in the first step of a
    # ramp, where alpha is 0, is nothing; STE and LSQ differ from the start. (From each other by
    # their scales, which batch norm takes out but for its epsilon: that is not looked at.)
    first_losses[method] = lines[0]["train_loss"]
    for other, loss in first_losses.items():
        if {other, method} == {"ste", "lsq"}:
            continue
        alike = other == method or not {"ste", "lsq"} & {other, method}
        assert (loss == pytest.approx(lines[0]["train_loss"], rel=1e-5)) == alike
    if method in ("ab", "lsq"):
        check_export(directory, summary["test"]["quantized"])
    if method == "lsq":
        check_learned_scales(directory)


def check_export(directory: Path, accuracy: float) -> None:
    """What is exported of a run has the accuracy that its record tells of."""
    export.run(export.Config(run=directory, out=directory / "net.safetensors"))
    model, variables = load_packed(directory / "net.safetensors")
    dataset = load("digits", validation=1397 - 128)
    images = (dataset.test.images / np.float32(255) - dataset.mean) / dataset.std
    images = images.astype(np.float32)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    right = np.sum(np.argmax(np.asarray(logits), axis=1) == dataset.test.labels)
    # Another program rounds otherwise: an image on the border may fall to the other side.
    assert abs(right - accuracy * len(dataset.test)) < 2.5


def check_learned_scales(directory: Path) -> None:
    """The exported file has the scales of the checkpoint, and the signs of its weights."""
    with Checkpoints(directory / "checkpoints") as checkpoints:
        trained = checkpoints.network()
    packed = read_packed(directory / "net.safetensors")
    assert packed.network["scales"] == "learned"
    assert len(trained["scales"]) == 9
    for path, scale in trained["scales"].items():
        layer = path.removesuffix("/kernel")
        weights, found = trained["params"][layer]["kernel"], packed.variables["params"][layer]
        np.testing.assert_array_equal(found["kernel"].scale, scale, strict=True)
        np.testing.assert_array_equal(found["kernel"].codes, np.where(weights >= 0, 1, -1))


def test_act_bits_quantizes_the_input_of_every_layer() -> None:
    model = make_model(Config(act_bits=4, width=1 / 32), num_classes=3, image_size=8)
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    layers = [name for name, leaf in variables["params"].items() if "kernel" in leaf]
    assert len(layers) == 9
    assert sorted(variables[RANGES]) == sorted(layers)
    rules = activation_rules(Config(act_bits=4))
    assert rules is not None
    bits = {layer: (rules.of(layer).bits, rules.of(layer).signed) for layer in ("conv0", "head")}
    assert bits == {"conv0": (8, True), "head": (4, False)}


def test_alpha_follows_the_flags() -> None:
    def alphas(**flags: Any) -> list[float]:
        c = settled(Config(**flags))
        method = method_of(c.method)
        schedule = alpha_schedule(method, str(c.ramp), c.ramp_start, c.ramp_stop, 100)
        return [float(schedule(step)) for step in (0, 20, 50, 80, 100)]

    assert alphas(method="float") == [0, 0, 0, 0, 0]
    assert alphas(method="ste") == alphas(method="lsq") == [1, 1, 1, 1, 1]
    for method in ("soft_ste", "ab"):
        ramp = {"method": method, "ramp_start": 0.2, "ramp_stop": 0.8}
        assert alphas(**ramp) == pytest.approx([0, 0, 0.875, 1, 1])
        assert alphas(**ramp, ramp="linear") == pytest.approx([0, 0, 0.5, 1, 1])
        assert alphas(**ramp, ramp="cosine") == pytest.approx([0, 0, 0.5, 1, 1])
        assert alphas(**ramp, ramp="jump") == [0, 1, 1, 1, 1]
        assert alphas(**ramp, ramp="sigmoid") == pytest.approx([0, 0, 0.5, 1, 1])
    for flags in ({}, {"ramp": "jump"}, {"ramp_start": 0.5}):
        assert alphas(method="float_then_ste", ramp_stop=0.5, **flags) == [0, 0, 1, 1, 1]


# The command line


@pytest.fixture
def stderr_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """What the command ends with, as one line without the frame that tyro draws."""

    def call(*flags: str) -> str:
        words = ["binarynet_cifar10", f"--runs_dir={tmp_path}", "--compilation_cache=", *flags]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit_:
            train.main(binarynet_cifar10.DEFAULTS, binarynet_cifar10.__doc__, "experiments.x")
        assert exit_.value.code not in (0, None)
        message = exit_.value.code if isinstance(exit_.value.code, str) else ""
        return plain(capsys.readouterr().err + message)

    return call


def plain(text: str) -> str:
    """The text without frames, colours and line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--learning_rat=0.1"], ["--learning_rat", "--learning_rate"]),
        (["--method=admm"], ["--method", "admm", "float, ste, soft_ste, ab, lsq"]),
        (["--epochs=many"], ["--epochs", "many"]),
        (["--weights=int9"], ["--weights=int9 is not known", "binary", "int8"]),
        (
            ["--activation=tanh"],
            ["--activation=tanh is not known", "relu6, sign"],
        ),
        (["--act_bits=4", "--activation=sign"], ["--act_bits=4 is for --activation=relu"]),
        (["--act_bits=9"], ["--act_bits=9: should be less than or equal to 8"]),
        (["--dataset=mnist"], ["--dataset=mnist is not known", "digits", "cifar10_jpeg"]),
    ],
)
def test_an_unknown_flag_or_value_is_named(
    stderr_of: Callable[..., str], flags: list[str], messages: list[str]
) -> None:
    error = stderr_of(*flags)
    for message in messages:
        if message == "float, ste, soft_ste, ab, lsq":
            assert all(choice in error for choice in message.split(", "))
        else:
            assert message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ramp_start=0.5", "--ramp_stop=0.5"], "must stop after it starts"),
        (["--ramp_start=0.75", "--ramp_stop=0.25", "--ramp=linear"], "must stop after it starts"),
        (["--warmup=30"], "A warm-up of 540 steps does not fit into 540 steps"),
        (["--learning_rate=-1"], "--learning_rate=-1.0: should be greater than 0"),
        (["--momentum=2"], "--momentum=2.0: should be less than 1"),
        (["--batch_size=5000"], "batch_size=5000 must lie between 1 and"),
        (["--batch_size=63"], "A batch of 63 cannot be shared evenly by 2 devices"),
        (["--init_from=nowhere"], "There is no run to start from in nowhere"),
        (["--image_size=3"], "image_size"),
        (["--method=lsq", "--weight_scale=one"], "The scales of Binary(axis=-1"),
        (["--watch=conv9/kernel"], "no quantized parameter 'conv9/kernel' to watch"),
    ],
)
def test_values_that_make_no_sense_end_with_one_line(
    stderr_of: Callable[..., str], flags: list[str], message: str
) -> None:
    tiny = ["--dataset=digits", "--batch_size=64", "--width=0.01"]
    given = {flag.partition("=")[0] for flag in flags}
    error = stderr_of(*(flag for flag in tiny if flag.partition("=")[0] not in given), *flags)
    assert error.startswith("error: ")
    assert message in error


def test_missing_data_is_named_with_the_command_that_prepares_it(
    stderr_of: Callable[..., str], tmp_path: Path
) -> None:
    error = stderr_of("--dataset=cifar10_jpeg", f"--data_dir={tmp_path / 'data'}")
    assert f"cifar10_jpeg is not prepared in {tmp_path / 'data'}" in error
    assert "python -m ab_jax.data.prepare cifar10_jpeg --source=PATH" in error


def test_a_complete_run_ends_with_one_line(stderr_of: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "record.json").write_text("{}")
    error = stderr_of("--dataset=digits", "--name=old")
    assert f"error: The run {tmp_path / 'old'} is complete. Choose another --name" in error


@pytest.mark.long
def test_a_stopped_run_exits_with_75_and_goes_on_with_its_own_flags_or_those_it_is_allowed(
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def call(*flags: str) -> tuple[Any, str]:
        values = {"dataset": tiny.dataset, "validation": tiny.validation, "width": tiny.width}
        values |= {"batch_size": 64, "epochs": 2, "warmup": 0, "runs_dir": tmp_path, "name": "x"}
        words = [f"--{flag}={value}" for flag, value in values.items()]
        places = [f"--compilation_cache={tiny.compilation_cache}", "--no_read_test"]
        monkeypatch.setattr(sys, "argv", ["binarynet_cifar10", *words, *places, *flags])
        try:
            train.main(binarynet_cifar10.DEFAULTS, binarynet_cifar10.__doc__, "experiments.x")
        except SystemExit as exit_:
            message = exit_.code if isinstance(exit_.code, str) else ""
            return exit_.code, plain(capsys.readouterr().err + message)
        return 0, ""

    whole = InMemory.training

    def stopping(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(whole(*args)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(InMemory, "training", stopping)
        code, told = call()
    assert code == 75
    assert f"{tmp_path}/x stopped at step 3, asked by SIGTERM" in told
    assert signal.getsignal(signal.SIGTERM) is handler

    _, told = call("--learning_rate=0.05", "--momentum=0.8", "--parallel=shard_map")
    assert "--learning_rate was 0.1, is 0.05, --momentum was 0.9, is 0.8." in told
    assert "--parallel" not in told
    assert "go on with the change by --allow_changed" in told

    assert call("--learning_rate=0.05", "--allow_changed")[0] == 0
    record = json.loads((tmp_path / "x" / "record.json").read_text())
    assert record["summary"]["resumed_at"] == 3
    assert record["config"]["learning_rate"] == 0.05
    change = {"of": "config", "name": "learning_rate", "was": 0.1, "is": 0.05}
    assert record["changed"] == [{"after_step": 3, **change}]
    assert record["data"]["version"] == "1.0.0"
    assert (record["data"]["classes"], record["data"]["image_shape"]) == (10, [8, 8, 1])
    assert record["data"]["images"] == {"train": 128, "validation": 1269, "test": 400}


def test_the_free_flags_are_flags() -> None:
    """A name mistyped there would free nothing."""
    assert {field.name for field in dataclasses.fields(Config)} >= FREE_FLAGS | PLACES


def test_help_says_what_each_flag_does() -> None:
    command = [sys.executable, "-m", "experiments.binarynet_cifar10", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = plain(result.stdout)
    flags = [field.name for field in dataclasses.fields(Config)]
    # Each flag's part of the text: choices and type, then what it does, then the default.
    starts = [re.search(rf" --{flag}(?=[ ,])", shown) for flag in flags]
    assert all(starts), [flag for flag, start in zip(flags, starts, strict=True) if not start]
    positions = sorted(start.start() for start in starts if start)
    texts = [shown[a:b] for a, b in zip(positions, [*positions[1:], None], strict=True)]
    silent = []
    for text in texts:
        said = re.sub(r"^ --\w+(, --no_\w+)?( \{[^}]*\})?(\|?[A-Z]+)?", "", text)
        said = re.sub(r"\(default: .*", "", said).strip()
        if not re.search(r"[a-z]", said) or said.startswith("--"):
            silent.append(text)
    assert silent == []
