"""ResNet-20: all its layers are quantized, and what a run leaves behind is exported."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.data import load
from ab_jax.linen import RANGES
from experiments import export, resnet20_cifar10
from experiments.exported.classifiers import read_classifier
from experiments.exported.finished_networks import load_packed
from experiments.reporting.run_records import read_records
from experiments.settings.build import make_model
from experiments.settings.config import Config
from experiments.settings.levels import weight_rules
from experiments.sweep import EXPERIMENTS
from tests.fast_compilation import FAST_COMPILATION, compiled

ROOT = Path(__file__).parents[2]
NAME = "resnet20_cifar10"


def shapes(config: Config) -> Any:
    """The collections of the network for ten classes."""
    model = make_model(config, num_classes=10, image_size=32)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def test_every_layer_is_quantized_and_nothing_else() -> None:
    config = resnet20_cifar10.DEFAULTS
    rules = weight_rules(config)
    params = jax.eval_shape(lambda tree: ab.quantize(tree, rules), shapes(config)["params"])
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, ab.Quantized))
    codes = [leaf.codes.size for leaf in leaves if isinstance(leaf, ab.Quantized)]
    # The paper's table: the stem, 6 convolutions of each of 16, 32 and 64 features, the head.
    stage0, stage1, stage2 = 6 * 16 * 16, (16 + 5 * 32) * 32, (32 + 5 * 64) * 64
    assert len(codes) == 20
    assert sum(codes) == 9 * (3 * 16 + stage0 + stage1 + stage2) + 64 * 10
    floats = [leaf.size for leaf in leaves if not isinstance(leaf, ab.Quantized)]
    # Scale and bias of a norm behind each convolution, and the bias of the head.
    assert sum(floats) == 2 * (7 * 16 + 6 * 32 + 6 * 64) + 10


def test_act_bits_quantizes_the_input_of_every_layer() -> None:
    config = dataclasses.replace(resnet20_cifar10.DEFAULTS, act_bits=4)
    assert len(jax.tree.leaves(shapes(config)[RANGES])) == 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps from the command line: the directory that it leaves."""
    directory = tmp_path_factory.mktemp("runs")
    flags = {"dataset": "digits", "validation": 1397 - 48, "batch_size": 16, "epochs": 1}
    flags |= {"width": 0.25, "warmup": 0, "weights": "ternary", "ramp_stop": 0.67}
    flags |= {"runs_dir": directory, "compilation_cache": directory / "cache", "name": "tiny"}
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{NAME}", "--no_flip", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": FAST_COMPILATION},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return directory / "tiny"


@pytest.mark.long
def test_a_run_ends_quantized_and_is_reported(finished: Path) -> None:
    assert NAME in EXPERIMENTS, "a sweep runs it"
    (record,) = read_records([finished / "record.json"])
    assert record.experiment == f"experiments.{NAME}"
    assert record.config["weight_decay"] == 1e-4
    line = record.metrics[-1]
    assert (line["step"], line["alpha"]) == (3, 1)
    assert line["blended_loss"] == line["quantized_loss"]
    for part in ("validation", "test"):
        assert record.summary[part]["blended"] == record.summary[part]["quantized"]


@pytest.mark.long
def test_every_file_of_a_run_gives_the_same_logits(
    finished: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    names = {"packed": "net.safetensors", "stablehlo": "net.stablehlo", "onnx": "net.onnx"}
    files = {kind: tmp_path / name for kind, name in names.items()}
    for kind, file in files.items():
        export.run(export.Config(run=finished, out=file, format=kind))
    model, variables = load_packed(files["packed"])
    # Ternary codes, by channel.
    kernel = np.asarray(variables["params"]["stage1_block0"]["conv0"]["kernel"])
    levels = [np.unique(channel) for channel in np.moveaxis(kernel, -1, 0)]
    assert all(len(values) == 3 and values[1] == 0 for values in levels)

    pixels = rng.integers(0, 256, (2, 8, 8, 1), np.uint8)
    data = load("digits", validation=1397 - 48)
    images = ((pixels / 255 - data.mean) / data.std).astype(np.float32)
    expected = np.asarray(compiled(lambda v, x: model.apply(v, x, train=False), variables, images))
    assert np.ptp(expected, axis=0).max() > 0.1 * np.ptp(expected), "the images count"
    program = jax.export.deserialize(bytearray(files["stablehlo"].read_bytes()))
    # All in float: nothing tips, and only the order of sums differs.
    for logits in (compiled(program.call, images), read_classifier(files["onnx"]).logits(pixels)):
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.ptp(expected))
