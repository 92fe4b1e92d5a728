"""Classifying image files with exported networks: the same classes with JAX and without it."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from PIL import Image

import ab_jax as ab
from ab_jax.data.augment import normalize
from ab_jax.data.jpeg import center_crop
from ab_jax.data.load import load
from ab_jax.data.pixels import box_downsample
from ab_jax.export.packed import write_packed
from ab_jax.models.binarynet import BinaryNet
from experiments import classify, export
from experiments.exported.classifiers import from_onnx
from experiments.exported.finished_networks import TrainedNetwork
from experiments.exported.pictures import fitted, read_picture
from experiments.settings.build import make_model
from experiments.settings.config import Config, recorded
from experiments.settings.levels import weight_rules

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
    network: TrainedNetwork
    files: dict[str, Path]


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """BinaryNet for digits, of random variables, as ONNX and packed."""
    rng = np.random.default_rng(request.config.getoption("seed"))
    config = Config(dataset="digits", width=1 / 32)
    model = make_model(config, num_classes=10, image_size=8)
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
    rules = weight_rules(config)
    variables["params"] = ab.quantize(variables["params"], rules)
    description = {
        "experiment": "experiments.binarynet_cifar10",
        "config": recorded(config),
        "classes": 10,
        "image_shape": list(SHAPE),
        "data": {"mean": [0.31], "std": [0.37], "class_names": NAMES},
    }
    network = TrainedNetwork(model, variables, rules, None, description)
    # Logits of some ten, where those of such norms are of thousands: then shares are all 0 or
    # 100 %, or, of two classes that are nearly alike, a matter of rounding.
    spread = np.ptp(logits_of(network, load("digits").test.images[:100]))
    norm = variables["params"]["head_norm"]
    variables["params"]["head_norm"] = jax.tree.map(lambda leaf: leaf * 10 / spread, norm)
    folder = tmp_path_factory.mktemp("exported")
    files = {"onnx": folder / "net.onnx", "packed": folder / "net.safetensors"}
    for form, path in files.items():
        assert export.FORMATS[form](network, path) == path.stat().st_size
    return Exported(network, files)


def logits_of(network: TrainedNetwork, images: np.ndarray) -> np.ndarray:
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
    tolerance = 1e-5 * np.ptp(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    # Of two classes that are as likely rounding chooses.
    chosen = np.take_along_axis(expected, found.argmax(1)[:, None], axis=1)
    np.testing.assert_allclose(chosen[:, 0], expected.max(1), rtol=0, atol=tolerance)
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


ErrorOf = Callable[..., str]


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> ErrorOf:
    """What the command says of these words in its one line."""

    def run(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["classify", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            classify.main()
        message = str(exit_.value.code)
        assert message.startswith("error: ")
        assert len(message.splitlines()) == 1
        assert len(message) < 1000
        assert capfd.readouterr() == ("", "")
        return message

    return run


def test_what_cannot_be_classified_is_said_in_a_line(
    exported: Exported, tmp_path: Path, error_of: ErrorOf
) -> None:
    net, picture = str(exported.files["onnx"]), str(tmp_path / "it.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "no.onnx").write_text("no network")
    plain = dict(exported.network.description, data={})
    bare = dataclasses.replace(exported.network, description=plain)
    for form, name in (("onnx", "bare.onnx"), ("packed", "bare.safetensors")):
        export.FORMATS[form](bare, tmp_path / name)

    assert "No such file" in error_of(tmp_path / "nothing.onnx", picture)
    assert "No such file" in error_of(net, tmp_path / "nothing.png")
    assert "text.png is not a readable PNG or JPEG" in error_of(net, tmp_path / "text.png")
    assert "must end in .onnx or .safetensors" in error_of(picture, picture)
    assert "cannot be read as an ONNX model" in error_of(tmp_path / "no.onnx", picture)
    assert "are normalized already" in error_of(tmp_path / "bare.onnx", picture)
    assert "does not tell the mean and std" in error_of(tmp_path / "bare.safetensors", picture)
    assert "--top=0 must be at least 1" in error_of(net, picture, "--top=0")
    assert "no images to classify" in error_of(net)


# Networks of others


def write_onnx(
    path: Path,
    shape: tuple[Any, ...] = ("batch", 8, 8, 1),
    *,
    names: str | None = None,
    classes: int = 3,
    nodes: tuple[tuple[str, list[str], list[str], dict[str, Any]], ...] = (),
    rank: int = 2,
) -> Path:
    """A network whose logits are the mean pixel times 0, 1, 2, ...; then more nodes."""
    helper, number = onnx.helper, onnx.TensorProto
    weights = {
        "spatial": np.array([1, 2, 3], np.int64),
        "weight": np.arange(classes, dtype=np.float32)[None],
        "one": np.ones(1, np.int64),
        "sides": np.array([1, 2], np.int64),
        "zero": np.zeros(1, np.float32),
    }
    made = [
        helper.make_node("Cast", ["images"], ["pixels"], to=number.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "spatial"], ["means"], keepdims=0),
        helper.make_node("Unsqueeze", ["means", "one"], ["column"]),
        helper.make_node("MatMul", ["column", "weight"], ["logits"]),
        *(helper.make_node(op, ins, outs, **fields) for op, ins, outs, fields in nodes),
    ]
    output = made[-1].output[0]
    graph = helper.make_graph(
        made,
        "net",
        [helper.make_tensor_value_info("images", number.UINT8, list(shape))],
        [helper.make_tensor_value_info(output, number.FLOAT, [None] * rank)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, producer_name="elsewhere"
    )
    if names is not None:
        onnx.helper.set_model_props(model, {"class_names": names})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "it.png"
    Image.fromarray(np.full((8, 8), 1, np.uint8)).save(path)
    return path


BAD_NAMES = {
    "5": "are 5, not one text",
    "[]": r"are \[\], not one text",
    '["a"]': "has 1 class_names, and gives logits of 3 classes",
    "{}": r"are \{\}, not one text",
    '"abc"': "are 'abc', not one text",
    "[null]": r"are \[None\], not one text",
    '["a", "b", 1]': r"are \['a', 'b', 1\], not one text",
    "true": "are True, not one text",
    "[" * 1000 + "]" * 1000: "class_names of",
    "[" * 900 + "]" * 900: "class_names of",
    "[" * 99_999: "are no JSON",
    "{": "are no JSON",
}


@pytest.mark.parametrize(("names", "message"), BAD_NAMES.items(), ids=range(len(BAD_NAMES)))
def test_names_that_are_none_are_said_in_a_line(
    tmp_path: Path, picture: Path, error_of: ErrorOf, names: str, message: str
) -> None:
    net = write_onnx(tmp_path / "net.onnx", names=names)
    error = error_of(net, picture)
    assert str(net) in error
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": ("n", 0, 0, 1)}, "must be at least 1"),
        ({"shape": ("n", "h", "h", 1)}, "must be at least 1"),
        ({"shape": ("n", None, None, 3)}, "must be at least 1"),
        ({"shape": (0, 8, 8, 1)}, "must be at least 1"),
        ({"shape": ("n", 8, 9, 1)}, "8 x 9 pixels and 1 channels"),
        ({"shape": ("n", 8, 8, 2)}, "8 x 8 pixels and 2 channels"),
        ({"shape": ("n", 30_000, 30_000, 3)}, "30000 x 30000 pixels at a time, 2700000000 bytes"),
        ({"shape": (2**30, 8, 8, 1)}, "takes 1073741824 images of 8 x 8 pixels"),
        (
            {"nodes": (("Unsqueeze", ["logits", "sides"], ["out"], {}),), "rank": 4},
            r"gives float32 of shape \(1, 1, 1, 3\) for 1 images, not logits",
        ),
        (
            {"nodes": (("Unsqueeze", ["logits", "one"], ["out"], {}),), "rank": 3},
            r"gives float32 of shape \(1, 1, 3\) for 1 images",
        ),
        (
            {"nodes": (("ReduceSum", ["logits"], ["out"], {"keepdims": 0}),), "rank": 0},
            r"gives float32 of shape \(\) for 1 images",
        ),
        ({"nodes": (("Div", ["logits", "zero"], ["out"], {}),)}, "logits that are not finite"),
        ({"nodes": (("Gather", ["logits", "spatial"], ["out"], {}),), "rank": 2}, "cannot be run"),
        ({"classes": 0}, "logits|cannot be"),
        ({"classes": 2**22 + 1}, r"logits of shape \(1, 4194305\); 4194304 are the most"),
    ],
)
def test_networks_of_other_shapes_are_said_in_a_line(
    tmp_path: Path, picture: Path, error_of: ErrorOf, fields: dict[str, Any], message: str
) -> None:
    net = write_onnx(tmp_path / "net.onnx", **fields)
    start = time.process_time()
    error = error_of(net, picture)
    assert time.process_time() - start < 3
    assert str(net) in error
    assert re.search(message, error)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_fixed_number_of_images_is_filled_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator, count: int
) -> None:
    """Each image has its own answer, wherever it stands among those that are run together."""
    pixels = rng.integers(0, 8, count)
    paths = [tmp_path / f"{i}.png" for i in range(count)]
    for path, pixel in zip(paths, pixels, strict=True):
        Image.fromarray(np.full((8, 8), pixel, np.uint8)).save(path)
    net = write_onnx(tmp_path / "net.onnx", (4, 8, 8, 1), names='["a", "b\\u001b[2J", "c"]')
    classify.run(classify.Config(model=net, images=tuple(paths), top=3))
    lines = capsys.readouterr().out.splitlines()
    for path, pixel in zip(paths, pixels, strict=True):
        assert lines.pop(0) == str(path)
        shares = np.exp(np.arange(3.0) * pixel)
        shown = dict(reversed(lines.pop(0).split(" %  ")) for _ in range(3))
        for name, share in zip(("a", "b\\x1b[2J", "c"), shares / shares.sum(), strict=True):
            assert abs(float(shown[name]) - 100 * share) < 0.006


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "does not tell the mean and std"),
        ({"mean": 5, "std": [1.0]}, "tells a mean of 5 and a std of"),
        ({"mean": [0.1], "std": [0]}, r"a std of \[0\], not a number"),
        ({"mean": [0.1, 0.2], "std": [1.0]}, r"a mean of \[0.1, 0.2\]"),
        ({"mean": [None], "std": [1.0]}, r"a mean of \[None\]"),
        ({"mean": [10**400], "std": [1.0]}, "tells a mean of"),
        ({"mean": [0.1], "std": [1.0], "class_names": 5}, "are 5, not one text"),
    ],
)
def test_descriptions_of_packed_files_that_are_none_are_said_in_a_line(
    exported: Exported,
    tmp_path: Path,
    picture: Path,
    error_of: ErrorOf,
    data: Any,
    message: str,
) -> None:
    path = tmp_path / "net.safetensors"
    description = json.loads(json.dumps(exported.network.description)) | {"data": data}
    write_packed(path, exported.network.variables, network=description)
    error = error_of(path, picture)
    assert str(path) in error
    assert re.search(message, error)
