"""The ImageNet experiments: both phases, and what their flags stand for."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ab_jax as ab
from ab_jax.data.prepare import prepare_image_folder
from ab_jax.models.resnet import TIMM_V2, TORCHVISION
from benchmarks.measuring.generated_imagenet import prepare_generated_imagenet
from experiments import mobilenet_v1_imagenet, resnet50_imagenet
from experiments.settings.build import make_model
from experiments.settings.levels import activation_rules, weight_rules
from experiments.settings.networks import stem_for
from tests.fast_compilation import FAST_COMPILATION

ROOT = Path(__file__).parents[2]


def run(experiment: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command line, on one device."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{experiment}", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": FAST_COMPILATION, "COLUMNS": "200"},
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Runs of a few steps on 48 training and 6 test images of 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("colours")
    for split, count in {"train": 16, "test": 2}.items():
        for label in range(3):
            for index in range(count):
                pixels = rng.integers(0, 100, (8, 8, 3))
                pixels[..., label] += 150
                path = directory / "source" / split / f"class{label}" / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    prepare_image_folder(directory / "source", "colours", directory / "data")
    values = {
        "dataset": "image_folder:colours",
        "data_dir": directory / "data",
        "runs_dir": directory / "runs",
        "compilation_cache": directory / "cache",
        "validation": 8,
        "batch_size": 8,
        "width": 1 / 16,
        "float_epochs": 0.8,  # of five batches
        "epochs": 1.0,
        "warmup": 0.0,
        "pad": 1,
        # Compiles in two thirds of the time; least squares is looked at where rules are.
        "weight_scale": "absmax",
        "weight_granularity": "tensor",
    }
    return [f"--{name}={value}" for name, value in values.items()]


def record_of(flags: list[str], name: str) -> dict[str, Any]:
    (runs,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--runs_dir="))
    return json.loads((Path(runs) / name / "record.json").read_text())


def check_quantized(record: dict[str, Any], weight_bits: int, act_bits: int) -> None:
    config, lines, summary = record["config"], record["metrics"], record["summary"]
    assert (config["weights"], config["act_bits"]) == (f"int{weight_bits}", act_bits)
    assert lines[-1]["alpha"] == lines[-1]["activation_alpha"] == 1
    assert all(np.isfinite(line["train_loss"]) for line in lines)
    # At alpha 1 the blended network is the quantized one.
    for part in ("validation", "test"):
        assert summary[part]["blended"] == summary[part]["quantized"]


def check_two_phases(flags: list[str], name: str) -> None:
    float_phase, record = record_of(flags, f"{name}/float"), record_of(flags, name)
    assert float_phase["config"]["method"] == "float"
    assert (
        float_phase["metrics"][-1]["alpha"] == float_phase["metrics"][-1]["activation_alpha"] == 0
    )
    assert float_phase["summary"]["test"] is None, "the test set is read once, at the end"
    assert record["config"]["init_from"].endswith(f"{name}/float")


def train_mobilenet(flags: list[str], name: str, bits: int, *start: str) -> None:
    chosen = [f"--weights=int{bits}", f"--act_bits={bits}", f"--name={name}"]
    done = run("mobilenet_v1_imagenet", *flags, *chosen, *start)
    assert done.returncode == 0, done.stderr
    # Before it starts the run says what becomes of each layer's input and of each parameter.
    assert re.search(rf"block3/pointwise +\.\* +{bits} bits, unsigned", done.stdout)
    assert re.search(r"stem/kernel .*Uniform +8 ", done.stdout)
    assert re.search(rf"block3/pointwise/kernel .*Uniform +{bits} ", done.stdout)
    check_quantized(record_of(flags, name), bits, bits)


@pytest.mark.long
def test_mobilenet_trains_from_scratch(flags: list[str]) -> None:
    train_mobilenet(flags, "m88", 8)
    check_two_phases(flags, "m88")


@pytest.mark.long
def test_mobilenet_trains_from_another_run(flags: list[str]) -> None:
    train_mobilenet(flags, "first", 8)
    (runs,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--runs_dir="))
    train_mobilenet(flags, "m44", 4, f"--init_from={runs}/first/float")
    assert record_of(flags, "m44")["config"]["init_from"] == f"{runs}/first/float"


@pytest.mark.long
def test_both_resnets_are_made_and_the_second_trains(flags: list[str]) -> None:
    for version, variant in ((1, TORCHVISION), (2, TIMM_V2)):
        config = dataclasses.replace(
            resnet50_imagenet.DEFAULTS, network=f"resnet50_v{version}", width=1 / 16
        )
        model = make_model(config, num_classes=3, image_size=8)
        assert (model.variant, model.stage_sizes) == (variant, (3, 4, 6, 3))
    bits = ["--weights=int4", "--act_bits=8", "--network=resnet50_v2", "--name=r2"]
    done = run("resnet50_imagenet", *flags, *bits)
    assert done.returncode == 0, done.stderr
    record = record_of(flags, "r2")
    assert record["config"]["network"] == "resnet50_v2"
    check_quantized(record, 4, 8)
    check_two_phases(flags, "r2")


@pytest.mark.long
def test_imagenet_itself_needs_its_directory_and_nothing_else(tmp_path: Path) -> None:
    prepare_generated_imagenet(tmp_path / "data", train=24, validation=5, seed=0)
    flags = [
        "--dataset=imagenet2012",
        f"--data_dir={tmp_path}/data",
        f"--runs_dir={tmp_path}/runs",
        f"--compilation_cache={tmp_path}/cache",
        "--image_size=32",  # of 224, to be fast
        "--validation=8",
        "--batch_size=8",
        "--width=0.0625",
        "--epochs=1",
        "--float_epochs=1",
        "--warmup=0",
        "--workers=1",
        "--name=stream",
    ]
    done = run("mobilenet_v1_imagenet", *flags)
    assert done.returncode == 0, done.stderr
    check_two_phases(flags, "stream")
    record = record_of(flags, "stream")
    check_quantized(record, 8, 8)
    assert record["summary"]["steps"] == 2
    for flag, value in (("classes", 10), ("pad", 4)):
        refused = run("mobilenet_v1_imagenet", *flags, f"--{flag}={value}", "--name=refused")
        assert refused.returncode == 1
        assert f"--{flag}={value} is for images in memory" in refused.stderr


def test_the_first_and_the_last_layer_keep_8_bits():
    config = dataclasses.replace(mobilenet_v1_imagenet.DEFAULTS, weights="int4", act_bits=3)
    assert [(p, q and q.bits) for p, q in weight_rules(config).rules] == [
        (r"(stem|head)/kernel", 8),
        (r"(.*/)?kernel", 4),
        (r".*", None),
    ]
    rules = activation_rules(config)
    assert rules is not None
    assert [(p, q.bits, q.signed) for p, q in rules.rules] == [
        ("stem", 8, True),
        ("head", 8, False),
        (".*", 3, False),
    ]
    assert activation_rules(dataclasses.replace(config, act_bits=None)) is None


def test_inputs_that_no_relu_precedes_are_signed_and_measured():
    config = dataclasses.replace(
        mobilenet_v1_imagenet.DEFAULTS, network="efficientnet_lite0", act_bits=4, act_range="fixed"
    )
    rules = activation_rules(config)
    assert rules is not None
    assert [(p, q.bits, q.signed, q.limit) for p, q in rules.rules] == [
        ("stem", 8, True, None),
        (r"block\d+/expand|top", 4, True, None),
        ("head", 8, False, 6.0),
        (".*", 4, False, 6.0),
    ]


def test_weights_have_scales_by_channel_or_one():
    for granularity, fit, axis in (("channel", "least_squares", -1), ("tensor", "absmax", None)):
        config = dataclasses.replace(
            mobilenet_v1_imagenet.DEFAULTS, weight_scale=fit, weight_granularity=granularity
        )
        quantizers = [q for _, q in weight_rules(config).rules if q]
        assert {(q.scale, q.axis) for q in quantizers} == {(fit, axis)}
        assert all(isinstance(q, ab.Uniform) for q in quantizers)


def test_the_range_of_activations_is_what_the_flag_says():
    for flag, expected in (
        ("max", (None, None)),
        ("percentile", (None, 99.9)),
        ("fixed", (6.0, None)),
    ):
        rules = activation_rules(
            dataclasses.replace(
                mobilenet_v1_imagenet.DEFAULTS, act_range=flag, act_backward="blended"
            )
        )
        assert rules is not None
        inner = rules.of("block3/pointwise")
        assert inner is not None
        assert (inner.limit, inner.percentile) == expected
        assert rules.of("stem").limit is None, "images are not bounded by 6"
        assert {q.backward for _, q in rules.rules} == {"blended"}


@pytest.mark.parametrize(
    ("size", "stem"), [(16, 32), (32, 32), (64, 64), (128, 224), (224, 224), (299, 224)]
)
def test_the_stem_fits_the_images(size, stem):
    assert stem_for(size) == stem


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--weights=int1"], ["--weights=int1 is not known", "binary"]),
        (["--act_bits=9"], ["--act_bits=9: should be less than or equal to 8"]),
        (["--dataset=imagenet"], ["--dataset=imagenet is not known"]),
        (["--init_from=nowhere"], ["no run to start from in nowhere"]),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    flags: list[str], wrong: list[str], words: list[str]
) -> None:
    done = run("mobilenet_v1_imagenet", *flags, *wrong, "--name=refused")
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for word in words:
        assert word in error
