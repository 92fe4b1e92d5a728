"""Classifying image files with exported networks: the same classes with JAX and without it."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ab_jax as ab
from ab_jax.data.augment import normalize
from ab_jax.data.jpeg import center_crop
from ab_jax.data.load import load
from ab_jax.data.pixels import box_downsample
from ab_jax.models.binarynet import BinaryNet
from experiments import binarynet_cifar10, classify, export
from experiments.classifying.networks import from_onnx
from experiments.classifying.pictures import fitted, read_picture
from experiments.exporting.networks import Network
from experiments.recipes import cifar
from experiments.recipes.processes import recorded

ROOT = Path(__file__).parents[2]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SHAPE = (8, 8, 1)

# A fresh process, with nothing of ours in it yet.
ELSEWHERE = """
import sys
from experiments.classify import main
main()
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"jax", "jaxlib", "flax", "optax", "orbax", "ab_jax", "onnx"}, loaded
"""


class Exported(NamedTuple):
    network: Network
    files: dict[str, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """BinaryNet for digits, of random variables, as ONNX and packed."""
    rng = np.random.default_rng()
    config = binarynet_cifar10.Config(dataset="digits", width=1 / 32)
    model = binarynet_cifar10.make_model(config, num_classes=10, image_size=8)
    assert isinstance(model, BinaryNet)
    spec = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), spec)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """Norms that amplify, so that the images still count at the end."""
        match path[-1].key:
            case "kernel":
                value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
            case "mean" | "bias":
                value = rng.normal(scale=0.3, size=leaf.shape)
            case "var":
                value = rng.uniform(0.05, 0.2, leaf.shape)
            case _:
                value = rng.uniform(0.5, 2, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    variables = jax.tree.map_with_path(draw, shapes)
    rules = cifar.weight_rules(config)
    variables["params"] = ab.quantize(variables["params"], rules)
    description = {
        "experiment": "experiments.binarynet_cifar10",
        "config": recorded(config),
        "classes": 10,
        "image_shape": list(SHAPE),
        "data": {"mean": [0.31], "std": [0.37], "class_names": NAMES},
    }
    network = Network(model, variables, rules, None, description)
    folder = tmp_path_factory.mktemp("exported")
    files = {"onnx": folder / "net.onnx", "packed": folder / "net.safetensors"}
    for form, path in files.items():
        assert export.FORMATS[form](network, path) == path.stat().st_size
    return Exported(network, files)


def logits_of(network: Network, images: np.ndarray) -> np.ndarray:
    """By the model's own code."""

    @jax.jit
    def apply(images: jax.Array) -> jax.Array:
        normalized = normalize(images, (0.31,), (0.37,))
        return network.model.apply(ab.dequantize(network.variables), normalized, train=False)

    return np.asarray(apply(images))


def test_the_whole_test_set_has_the_same_classes_in_onnx_runtime(exported: Exported) -> None:
    images = load("digits").test.images
    expected = logits_of(exported.network, images)
    found = from_onnx(exported.files["onnx"]).logits(images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    # A random network may find one class everywhere, but its logits tell the images apart.
    assert np.ptp(found, axis=0).max() > 0.01 * np.ptp(found)


def test_image_files_are_classified_with_jax_and_without(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load("digits").test.images[:2]
    paths = [tmp_path / "small.png", tmp_path / "large.png"]
    Image.fromarray(digits[0, ..., 0]).save(paths[0])
    # Each pixel as 3 x 3 of them, in color: the boxes' means are the pixels again.
    large = np.repeat(np.repeat(digits[1], 3, axis=0), 3, axis=1)
    Image.fromarray(np.repeat(large, 3, axis=2)).save(paths[1])
    logits = logits_of(exported.network, digits).astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)

    words = [str(exported.files["onnx"]), *map(str, paths), "--top=3"]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    classify.run(classify.Config(model=exported.files["packed"], images=tuple(paths), top=3))
    for output in (done.stdout, capsys.readouterr().out):
        lines = output.splitlines()
        assert len(lines) == 2 * 4
        for path, share in zip(paths, shares, strict=True):
            assert lines.pop(0) == str(path)
            for expected in np.sort(100 * share)[::-1][:3]:
                ((percent, name),) = re.findall(r"^ *([\d.]+) %  (\w+)$", lines.pop(0))
                assert abs(float(percent) - expected) < 0.006
                # By the name, since of equal shares either may come first.
                assert abs(float(percent) - 100 * share[NAMES.index(name)]) < 0.006


def test_images_are_cut_and_resized_as_in_evaluation(rng: np.random.Generator) -> None:
    square = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(fitted(square, 8), box_downsample(square, 8, "it"))
    for height, width, size in ((50, 70, 16), (9, 9, 16)):
        photo = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        expected = np.empty((size, size, 3), np.uint8)
        center_crop(photo, expected)
        np.testing.assert_array_equal(fitted(photo, size), expected)


def test_a_gray_file_becomes_color_where_the_network_wants_it(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    gray = rng.integers(0, 256, (6, 6)).astype(np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    color = read_picture(tmp_path / "gray.png", (6, 6, 3))
    np.testing.assert_array_equal(color, np.repeat(gray[..., None], 3, axis=2))
    with pytest.raises(ValueError, match="4 channels; files are read as squares of gray or RGB"):
        read_picture(tmp_path / "gray.png", (6, 6, 4))


def test_what_cannot_be_classified_is_said_in_a_line(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, picture = str(exported.files["onnx"]), str(tmp_path / "it.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "no.onnx").write_text("no network")
    plain = dict(exported.network.description, data={})
    bare = dataclasses.replace(exported.network, description=plain)
    for form, name in (("onnx", "bare.onnx"), ("packed", "bare.safetensors")):
        export.FORMATS[form](bare, tmp_path / name)

    def error_of(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["classify", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            classify.main()
        message = str(exit_.value.code)
        assert message.startswith("error: ")
        assert len(message.splitlines()) == 1
        return message

    assert "No such file" in error_of(tmp_path / "nothing.onnx", picture)
    assert "No such file" in error_of(net, tmp_path / "nothing.png")
    assert "text.png is not a readable PNG or JPEG" in error_of(net, tmp_path / "text.png")
    assert "must end in .onnx or .safetensors" in error_of(picture, picture)
    assert "cannot be read as an ONNX model" in error_of(tmp_path / "no.onnx", picture)
    assert "are normalized already" in error_of(tmp_path / "bare.onnx", picture)
    assert "does not tell the mean and std" in error_of(tmp_path / "bare.safetensors", picture)
    assert "--top=0 must be at least 1" in error_of(net, picture, "--top=0")
    assert "no images to classify" in error_of(net)
