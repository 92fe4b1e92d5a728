"""What README and the pages right behind it show is run: Python, and the flags of commands."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tyro

import ab_jax as ab
from ab_jax.export.packed import read_packed
from ab_jax.products import check_ranges

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs/library.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The Python of README and of the page behind it, run in order: its names, what it printed."""
    printed = io.StringIO()
    with contextlib.chdir(tmp_path_factory.mktemp("readme")), contextlib.redirect_stdout(printed):
        names = {"step": 1_000}
        for block in re.findall(r"```python\n(.*?)```", README + LIBRARY, re.DOTALL):
            exec(block, names)
        names["network"] = read_packed("model.safetensors")
    return {
        **names,
        "printed": printed.getvalue(),
        "batch": jax.tree.map(lambda x: x[:16], names["train"]),
    }


def test_a_first_time_users_path(example):
    """What describe shows is shown, the network learns, and its file holds its codes."""
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert example["printed"].startswith(shown)
    (accuracy,) = re.findall(r"([\d.]+)% of test inputs", example["printed"])
    _, labels = example["test"]
    most_frequent = np.bincount(labels).max() / len(labels)
    assert float(accuracy) > 100 * most_frequent + 30
    loaded = ab.dequantize(example["network"].variables)["params"]
    blended = ab.blend(example["params"], example["rules"], 1.0)
    jax.tree.map(np.testing.assert_array_equal, loaded, blended)


def test_the_example_trains_by_alpha_blending(example):
    gradient = jax.jit(jax.grad(example["loss_fn"]))
    params, batch = example["params"], example["batch"]
    plain = jax.grad(lambda p: example["loss_fn"](p, batch, 0))(params)
    halfway = gradient(params, batch, 1_000)
    at_end = gradient(params, batch, 1_800)
    assert float(np.abs(plain["hidden"]["kernel"]).max()) > 0
    assert float(np.abs(halfway["hidden"]["kernel"]).max()) > 0
    for layer in ("stem", "hidden", "head"):
        np.testing.assert_array_equal(at_end[layer]["kernel"], 0)
        assert float(np.abs(at_end[layer]["bias"]).max()) > 0


def test_the_example_with_activations_measures_a_range_for_each_layer(example):
    loss_fn, params, batch = (example[name] for name in ("loss_fn_with_inputs", "params", "batch"))
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, ranges), _ = gradient(params, example["ranges"], batch, 0)
    np.testing.assert_allclose(loss, example["loss_fn"](params, batch, 0), rtol=1e-6)
    assert set(ranges) == {"stem/kernel", "hidden/kernel", "head/kernel"}
    largest = np.abs(batch["image"]).max()
    np.testing.assert_allclose(ranges["stem/kernel"].limit, largest, rtol=1e-6)
    check_ranges(ranges)
    (halfway, _), grads = gradient(params, ranges, batch, 1_000)
    assert np.isfinite(halfway)
    assert float(np.abs(grads["stem"]["kernel"]).max()) > 0


def test_the_example_ends_in_the_network_of_its_codes(example):
    params, batch, rules = example["params"], example["batch"], example["rules"]
    quantized = ab.quantize(params, rules)
    assert [quantized[layer]["kernel"].bits for layer in ("stem", "hidden", "head")] == [8, 4, 8]
    logits = example["model"].apply({"params": ab.dequantize(quantized)}, batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    np.testing.assert_allclose(example["loss_fn"](params, batch, 1_800), loss, rtol=1e-6)


def commands():
    # Tables bring commands of their own, which the tests of the report read back.
    text = re.sub(r"<!-- table: .*?<!-- /table: ", "", README + EXPERIMENTS, flags=re.DOTALL)
    lines = re.findall(r"python -m ((?:experiments|benchmarks)(?:\.\w+)+)([^`\n]*)", text)
    assert {name.partition(".")[0] for name, _ in lines} == {"experiments", "benchmarks"}
    return lines


@pytest.mark.parametrize(("name", "arguments"), commands())
def test_the_flags_of_each_command_exist(name, arguments):
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):  # a package, of which -m runs this
        module = importlib.import_module(f"{name}.__main__")
    own, _, passed_on = arguments.partition(" -- ")
    config = tyro.cli(module.Config, args=shlex.split(own), use_underscores=True)
    if passed_on:
        experiment = importlib.import_module(f"experiments.{config.experiment}")
        words = [word for word in shlex.split(passed_on) if word != "--"]  # between several runs
        flags = {word.partition("=")[0].removeprefix("--") for word in words}
        assert flags <= set(experiment.Config.__dataclass_fields__)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_it_is_read_in_five_minutes():
    shown = re.sub(r"<!--.*?-->", "", README, flags=re.DOTALL)
    assert len(README.splitlines()) <= 150
    assert len(shown.split()) <= 1_500


def test_the_pictures_exist():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), f"README shows {picture}, which does not exist"
