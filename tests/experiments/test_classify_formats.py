"""One network in every format that `experiments.export` writes, read by `experiments.classify`."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import classify, export
from experiments.exported.classifiers import read_classifier
from experiments.exported.image_inputs import Told
from tests.experiments.test_classify import NAMES, ROOT, SHAPE, Exported, logits_of
from tests.experiments.test_classify import error_of as error_of
from tests.experiments.test_classify import exported as exported
from tests.experiments.test_classify import picture as picture

# By format: the file's name, and what it does not tell.
FILES = {
    "packed": ("net.safetensors", Told()),
    "stablehlo": (
        "net.stablehlo",
        Told(mean=(0.31,), std=(0.37,), class_names=tuple(NAMES)),
    ),
    "qwix": ("net", Told()),
    "onnx": ("net.onnx", Told()),
    "onnx_int4": ("net4.onnx", Told()),
    "onnx_integer_bias": ("net_biases.onnx", Told()),
    "litert": ("net.tflite", Told()),
}
ALONE = """
import sys
from experiments.classify import main
main()
loaded = {name.partition(".")[0] for name in sys.modules}
assert "ai_edge_litert" in loaded
ours = {"jax", "jaxlib", "flax", "optax", "orbax", "ab_jax", "onnx", "onnxruntime", "tensorflow"}
assert not loaded & ours, loaded
"""


def test_every_format_has_a_reader() -> None:
    assert FILES.keys() == export.FORMATS.keys()


@pytest.mark.parametrize("form", FILES)
def test_every_format_has_the_answers_of_the_network(
    exported: Exported, tmp_path: Path, rng: np.random.Generator, form: str
) -> None:
    name, told = FILES[form]
    export.FORMATS[form](exported.network, tmp_path / name)
    network = read_classifier(tmp_path / name, told)
    assert network.image_shape == SHAPE
    assert network.class_names == tuple(NAMES)
    images = rng.integers(0, 256, (7, *SHAPE)).astype(np.uint8)
    expected = logits_of(exported.network, images)
    for count in (7, 2):  # after one another, by one interpreter
        found = network.logits(images[:count])
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-5 * np.ptp(expected))


def test_a_tflite_file_needs_litert_alone(
    exported: Exported, tmp_path: Path, rng: np.random.Generator
) -> None:
    net, folder = tmp_path / "net.tflite", tmp_path / "pictures"
    export.FORMATS["litert"](exported.network, net)
    folder.mkdir()
    images = rng.integers(0, 256, (3, *SHAPE)).astype(np.uint8)
    for name, image in zip(("b.PNG", "a.png", "c.bmp"), images, strict=True):
        Image.fromarray(image[..., 0]).save(folder / name)
    for other in ("._a.png", "notes.txt", "d.png.part"):
        (folder / other).write_text("no image")
    (folder / "inner.png").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(net), str(folder), "--top=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[::2] == [str(folder / name) for name in ("a.png", "b.PNG", "c.bmp")]
    logits = logits_of(exported.network, images[[1, 0, 2]]).astype(np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    for line, share in zip(lines[1::2], shares, strict=True):
        percent, name = line.split(" %  ")
        assert abs(float(percent) - 100 * share[NAMES.index(name)]) < 0.006


def test_folders_and_files_are_read_in_the_order_given(
    exported: Exported, tmp_path: Path, picture: Path, capsys
) -> None:
    folder, empty = tmp_path / "pictures", tmp_path / "empty"
    for path in (folder, empty):
        path.mkdir()
    (empty / "notes.txt").write_text("no image")
    for name in ("2.png", "10.png"):
        (folder / name).write_bytes(picture.read_bytes())
    images = (picture, folder, picture)
    classify.run(classify.Config(model=exported.files["onnx"], images=images, top=1))
    expected = [picture, folder / "10.png", folder / "2.png", picture]
    assert capsys.readouterr().out.splitlines()[::2] == [str(path) for path in expected]
    images = (picture, empty)
    with pytest.raises(ValueError, match=rf"{empty} has no images \(.jpg, .* directly in it"):
        classify.run(classify.Config(model=exported.files["onnx"], images=images))


@pytest.mark.parametrize("form", ["packed", "qwix", "onnx", "litert"])
def test_flags_agree_with_a_file_or_are_refused(
    exported: Exported, tmp_path: Path, picture: Path, error_of, form: str
) -> None:
    net = tmp_path / FILES[form][0]
    export.FORMATS[form](exported.network, net)
    read_classifier(net, Told(mean=(0.31,), std=(0.37,), image_size=8))
    names = tmp_path / "names.txt"
    names.write_text("\ufeff" + "\r\n".join(f"n {i}" for i in range(10)) + "\n\n", "utf-8")
    for flags, wanted in (
        (("--mean=0.3", "--std=0.37"), "--mean and --std are (0.3,) and (0.37,), but "),
        (("--image_size=9",), "--image_size=9, but "),
        (("--output=nothing",), "nothing|--output does not apply"),
    ):
        message = error_of(net, picture, *flags)
        assert str(net) in message
        assert any(part in message for part in wanted.split("|"))
    told = Told(class_names=classify.read_class_names(names))
    assert read_classifier(net, told).class_names == tuple(f"n {i}" for i in range(10))
    names.write_text("one\ntwo")
    message = error_of(net, picture, f"--class_names={names}")
    assert "has 2 class_names, and gives logits of 10 classes" in message
    assert "correct --class_names" in message


@pytest.mark.parametrize("form", ["packed", "qwix", "litert", "onnx"])
def test_flags_say_what_an_older_record_does_not(
    exported: Exported, tmp_path: Path, picture: Path, error_of, rng, form: str
) -> None:
    network = exported.network
    bare = type(network)(
        *(network.model, network.variables, network.rules, None),
        {**network.description, "data": {}},
    )
    net = tmp_path / FILES[form][0]
    export.FORMATS[form](bare, net)
    message = error_of(net, picture)
    assert str(net) in message
    assert "Give --mean and --std" in message
    images = rng.integers(0, 256, (2, *SHAPE)).astype(np.uint8)
    found = read_classifier(net, Told(mean=(0.31,), std=(0.37,)))
    assert found.class_names is None
    expected = logits_of(network, images)
    np.testing.assert_allclose(found.logits(images), expected, rtol=0, atol=1e-5 * np.ptp(expected))


# Programs


def written(path: Path, apply, *shapes: jax.ShapeDtypeStruct) -> Path:
    checks = [jax.export.DisabledSafetyCheck.custom_call("elsewhere")]
    program = jax.export.export(jax.jit(apply), disabled_checks=checks)(*shapes)
    path.write_bytes(program.serialize())
    return path


def test_a_program_that_calls_other_code_is_not_run(
    tmp_path: Path, picture: Path, error_of
) -> None:
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)

    def outside(x: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((1, 3), jnp.float32)
        return jax.ffi.ffi_call("elsewhere", result)(x)

    net = written(tmp_path / "net.stablehlo", outside, images)
    message = error_of(net, picture)
    assert "calls code outside of it: 'custom_call @elsewhere'. It is not run" in message


def test_programs_of_pixels_and_what_is_none(tmp_path: Path, picture: Path, error_of) -> None:
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.uint8)
    net = written(tmp_path / "net.stablehlo", lambda x: x.reshape(2, -1)[:, :5] / 8, images)
    network = read_classifier(net)
    assert network.batch == 2
    pixels = np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1)
    np.testing.assert_allclose(network.logits(pixels), pixels.reshape(2, -1)[:, :5] / 8)
    assert "normalizes them by itself" in error_of(net, picture, "--mean=0.5", "--std=0.5")
    assert "--output does not apply" in error_of(net, picture, "--output=x")
    float_ = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    net = written(tmp_path / "floats.stablehlo", lambda x: x.mean((1, 2)), float_)
    assert "Give --mean and --std" in error_of(net, picture)
    net = written(tmp_path / "two.stablehlo", lambda x, y: x + y, float_, float_)
    assert "takes no images" in error_of(net, picture)
    (tmp_path / "no.stablehlo").write_text("no program")
    assert "cannot be read as a StableHLO program" in error_of(tmp_path / "no.stablehlo", picture)
    assert "There is no checkpoint in" in error_of(tmp_path, picture)


def test_a_qwix_folder_of_another_network_is_refused(
    exported: Exported, tmp_path: Path, picture: Path, error_of
) -> None:
    network = exported.network
    for change in ({"config": {}}, {"image_shape": 5}, {"classes": 11}):
        other = json.loads(json.dumps(network.description)) | change
        fields = (network.model, network.variables, network.rules, None, other)
        export.FORMATS["qwix"](type(network)(*fields), tmp_path / "net")
        message = error_of(tmp_path / "net", picture)
        assert f"{tmp_path / 'net'} holds none of the experiments' networks" in message
