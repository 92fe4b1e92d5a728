"""Networks of others by flags: the answers of their runtimes on pixels prepared by hand."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from ab_jax.export.litert.flatbuffer import Flatbuffer, Scales
from experiments import classify
from experiments.exported.classifiers import read_classifier
from experiments.exported.image_inputs import Told, read_class_names
from experiments.exported.pictures import read_picture
from tests.experiments.test_classify import error_of as error_of
from tests.experiments.test_classify import picture as picture

SIZE, CLASSES = 6, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZED = Told(mean=MEAN, std=STD)


def normalized(pixels: np.ndarray, mean: Sequence[float] = MEAN, std: Any = STD) -> np.ndarray:
    return (pixels.astype(np.float64) / 255 - mean) / std


def shares_of(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)


# ONNX


def write_onnx(
    path: Path,
    rng: np.random.Generator,
    shape: Sequence[Any],
    *,
    kind: int = TensorProto.FLOAT,
    name: str = "data",
    metadata: dict[str, str] | None = None,
    softmax: bool = False,
) -> Path:
    """A dense layer on all pixels, whose output is `logits`, after another one, `features`."""
    count = SIZE * SIZE * 3
    arrays = {
        "flat": np.array([-1, count], np.int64),
        "weight": rng.normal(size=(count, CLASSES)).astype(np.float32) / 255,
        "double": np.full(1, 2, np.float32),
    }
    nodes = [
        helper.make_node("Cast", [name], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weight"], ["features"]),
        helper.make_node("Mul", ["features", "double"], ["raw"]),
        helper.make_node("Softmax" if softmax else "Identity", ["raw"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, list(shape))],
        [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, CLASSES])
            for output in ("features", "logits")
        ],
        [numpy_helper.from_array(array, key) for key, array in arrays.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def by_onnxruntime(path: Path, given: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: given}), strict=True))


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (("n", 3, SIZE, SIZE), {}),
        ((3, 3, SIZE, SIZE), {}),
        (("n", SIZE, SIZE, 3), {}),
        (("n", 3, "h", "w"), {"image_size": SIZE}),
        ((None, "h", "w", 3), {"image_size": SIZE}),
        (("n", "a", "b", "c"), {"image_size": SIZE, "layout": "NCHW"}),
        (("n", "a", "b", "c"), {"image_size": SIZE, "layout": "NHWC"}),
    ],
)
def test_floats_of_either_layout(
    tmp_path: Path,
    rng: np.random.Generator,
    pixels: np.ndarray,
    shape: Sequence[Any],
    told: dict[str, Any],
) -> None:
    net = write_onnx(tmp_path / "net.onnx", rng, shape, name="any name/it:0")
    given = normalized(pixels).astype(np.float32)
    if shape[1] == 3 or told.get("layout") == "NCHW":
        given = given.transpose(0, 3, 1, 2)
    expected = by_onnxruntime(net, np.ascontiguousarray(given))
    for output in (None, "features", "logits"):
        found = read_classifier(net, Told(mean=MEAN, std=STD, output=output, **told))
        wanted = expected[output or "features"]
        np.testing.assert_allclose(found.logits(pixels), wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.probabilities(pixels), shares_of(wanted), atol=1e-4)
    assert found.image_shape == (SIZE, SIZE, 3)
    assert found.class_names is None


def test_bytes_go_in_as_they_are(
    tmp_path: Path, rng: np.random.Generator, pixels: np.ndarray
) -> None:
    shape = ("n", 3, SIZE, SIZE)
    net = write_onnx(tmp_path / "net.onnx", rng, shape, kind=TensorProto.UINT8)
    expected = by_onnxruntime(net, np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    found = read_classifier(net).logits(pixels)
    np.testing.assert_allclose(found, expected["features"], rtol=1e-5, atol=1e-5)


def test_probabilities_are_shown_as_they_are(
    tmp_path: Path, rng: np.random.Generator, pixels: np.ndarray
) -> None:
    net = write_onnx(tmp_path / "net.onnx", rng, ("n", 3, SIZE, SIZE), softmax=True)
    given = np.ascontiguousarray(normalized(pixels).transpose(0, 3, 1, 2), np.float32)
    expected = by_onnxruntime(net, given)["logits"]
    for softmax in (None, False, True):
        told = Told(mean=MEAN, std=STD, output="logits", softmax=softmax)
        found = read_classifier(net, told).probabilities(pixels)
        wanted = shares_of(expected) if softmax else expected
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_command_names_what_a_file_of_others_sees(
    tmp_path: Path, rng: np.random.Generator, pixels: np.ndarray, capsys
) -> None:
    net = write_onnx(tmp_path / "net.onnx", rng, ("n", 3, SIZE, SIZE))
    names = [f"class\u00e9 {i}" for i in range(CLASSES)]
    (tmp_path / "names.txt").write_text("\n".join(names), "utf-8")
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i}.png")
    classify.run(
        classify.Config(
            model=net,
            images=(tmp_path / "pictures",),
            mean=MEAN,
            std=(0.25,),
            class_names=tmp_path / "names.txt",
            output="logits",
            top=CLASSES,
        )
    )
    given = normalized(pixels, MEAN, 0.25).astype(np.float32).transpose(0, 3, 1, 2)
    shares = 100 * shares_of(by_onnxruntime(net, np.ascontiguousarray(given))["logits"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * (1 + CLASSES)
    for share in shares:
        lines.pop(0)
        shown = dict(reversed(lines.pop(0).split(" %  ")) for _ in range(CLASSES))
        for name, value in zip(names, share, strict=True):
            assert abs(float(shown[name]) - value) < 0.02


def test_arrays_of_a_file_lie_beside_it_or_nowhere(
    tmp_path: Path, rng: np.random.Generator, pixels: np.ndarray, monkeypatch
) -> None:
    """A file that names others reads none but those of its own folder."""
    (tmp_path / "nets").mkdir()
    net = write_onnx(tmp_path / "nets" / "net.onnx", rng, ("n", 3, SIZE, SIZE))
    expected = read_classifier(net, NORMALIZED).logits(pixels)
    model = onnx.load(net)
    (weight,) = (array for array in model.graph.initializer if array.name == "weight")
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for place in (tmp_path / "nets" / "net.data", tmp_path / "secret", tmp_path / "cwd" / "here"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
    monkeypatch.chdir(tmp_path / "cwd")
    for location in ("net.data", "../secret", str(tmp_path / "secret"), "here"):
        del weight.external_data[:]
        weight.external_data.add(key="location", value=location)
        net.write_bytes(model.SerializeToString())
        if location == "net.data":
            found = read_classifier(net, NORMALIZED).logits(pixels)
            np.testing.assert_array_equal(found, expected)
            continue
        with pytest.raises(ValueError, match=r"net\.onnx cannot be read as an ONNX model"):
            read_classifier(net, NORMALIZED)


# TFLite


def write_litert(
    path: Path,
    rng: np.random.Generator,
    kind: str = "FLOAT32",
    *,
    scales: tuple[float, int] = (1 / 50, 100),
    out: tuple[float, int] | None = None,
    first: bool = False,
    softmax: bool = False,
) -> Path:
    """A dense layer on all pixels; integers in by `scales` and out by `out`."""
    file, count = Flatbuffer(), SIZE * SIZE * 3
    shape = (3, SIZE, SIZE) if first else (SIZE, SIZE, 3)

    def tensor(
        name: str, shape: tuple[int, ...], kind: str = "FLOAT32", scales: Scales | None = None
    ) -> int:
        signature = (-1, *shape)
        return file.add(name, (1, *shape), signature=signature, kind=kind, scales=scales)

    def quantized(pair: tuple[float, int]) -> Scales:
        return Scales(np.array([pair[0]], np.float32), np.array([pair[1]]))

    integers = kind != "FLOAT32"
    images = tensor("serving_input:0", shape, kind, quantized(scales) if integers else None)
    floats = images
    if integers:
        floats = tensor("floats", shape)
        file.operator("DEQUANTIZE", [images], [floats], schema.DequantizeOptionsT(), 2)
    rows, logits = tensor("rows", (count,)), tensor("Identity:0", (CLASSES,))
    sizes = file.constant("sizes", np.array([-1, count], np.int32))
    file.operator("RESHAPE", [floats, sizes], [rows], schema.ReshapeOptionsT(newShape=[-1, count]))
    weight = rng.normal(size=(CLASSES, count)).astype(np.float32) / 5
    file.operator(
        "FULLY_CONNECTED",
        [rows, file.constant("weight", weight), file.constant("bias", np.ones(4, np.float32))],
        [logits],
        schema.FullyConnectedOptionsT(),
    )
    if softmax:
        logits, raw = tensor("shares", (CLASSES,)), logits
        file.operator("SOFTMAX", [raw], [logits], schema.SoftmaxOptionsT(beta=1))
    if out is not None:
        given, floats = tensor("Codes:0", (CLASSES,), kind, quantized(out)), logits
        file.operator("QUANTIZE", [floats], [given], schema.QuantizeOptionsT())
        logits = given
    path.write_bytes(file.serialize({"images": images}, {"logits": logits}))
    return path


def by_litert(path: Path, given: np.ndarray) -> np.ndarray:
    interpreter = Interpreter(str(path), num_threads=1)
    (images,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(images["index"], given.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(images["index"], given)
    interpreter.invoke()
    return interpreter.get_tensor(logits["index"])


@pytest.mark.parametrize("first", [False, True], ids=["NHWC", "NCHW"])
def test_litert_of_floats(
    tmp_path: Path, rng: np.random.Generator, pixels: np.ndarray, first: bool
) -> None:
    net = write_litert(tmp_path / "net.tflite", rng, first=first)
    given = normalized(pixels).astype(np.float32)
    given = np.ascontiguousarray(given.transpose(0, 3, 1, 2) if first else given)
    found = read_classifier(net, Told(mean=MEAN, std=STD, output="Identity:0"))
    assert found.batch is None
    np.testing.assert_allclose(found.logits(pixels), by_litert(net, given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["UINT8", "INT8"])
def test_litert_of_integers(
    tmp_path: Path, rng: np.random.Generator, pixels: np.ndarray, kind: str
) -> None:
    """Normalized pixels are rounded to the file's codes, and saturate as LiteRT's do."""
    dtype = np.dtype(kind.lower())
    zero = 128 if kind == "UINT8" else 0
    scale, out_scale = 1 / 80, 1 / 4  # so that some pixels saturate
    net = write_litert(
        tmp_path / "net.tflite", rng, kind, scales=(scale, zero), out=(out_scale, zero)
    )
    ends = np.iinfo(dtype)
    quotients = normalized(pixels) / np.float32(scale)
    given = np.clip(np.rint(quotients) + zero, ends.min, ends.max).astype(dtype)
    assert np.any(given == ends.max)
    assert np.all(np.abs(quotients - np.floor(quotients) - 0.5) > 1e-4)  # none on a border
    codes = by_litert(net, given)
    assert codes.dtype == dtype
    expected = (codes.astype(np.float64) - zero) * out_scale
    found = read_classifier(net, NORMALIZED)
    np.testing.assert_allclose(found.logits(pixels), expected)
    np.testing.assert_allclose(found.probabilities(pixels), shares_of(expected), atol=1e-6)


def test_litert_of_bytes_as_they_are_and_probabilities(
    tmp_path: Path, rng: np.random.Generator, pixels: np.ndarray, picture: Path, error_of
) -> None:
    net = write_litert(tmp_path / "net.tflite", rng, "UINT8", out=(1 / 256, 0), softmax=True)
    expected = by_litert(net, pixels).astype(np.float64) / 256
    np.testing.assert_allclose(read_classifier(net).probabilities(pixels), expected, atol=1e-9)
    net = write_litert(tmp_path / "net.tflite", rng, "INT8", scales=(1 / 128, 0))
    assert "normalized already, int8" in error_of(net, picture)


# Refusals

LONE = ("--mean=0.5", "--std=0.5")


@pytest.mark.parametrize(
    ("shape", "flags", "message"),
    [
        (("n", 3, 6, 6), (), "images that are normalized already, float32.*Give --mean and --std"),
        (("n", 3, 6, 6), ("--mean=0.5",), "Give both of --mean and --std"),
        (("n", 3, 6, 6), ("--mean=0.5", "--std=0"), "those of --std above 0"),
        (("n", 3, 6, 6), ("--mean=nan", "--std=1"), "must be finite"),
        (("n", 3, 6, 6), ("--std=0.5", "--mean", "1", "2"), "--mean has 2 numbers and --std 1"),
        (("n", 1, 6, 6), ("--std=0.5", "--mean", "1", "2", "3"), "images of .* have 1 channels"),
        (("n", 3, 6, 6), (*LONE, "--image_size=7"), "--image_size=7, but .* of 6 x 6 pixels"),
        (("n", 3, 6, 6), (*LONE, "--image_size=0"), "--image_size=0 must be at least 1"),
        (("n", 3, 6, 6), (*LONE, "--layout=CHW"), "--layout=CHW is none of NHWC, NCHW"),
        (("n", 3, 6, 6), (*LONE, "--layout=NHWC"), "of 3 x 6 pixels and 6 channels"),
        (("n", 3, 6, 6), (*LONE, "--output=x"), r"outputs of .* are \['features', 'logits'\]"),
        (("n", 3, 6, 3), LONE, "channels may be first or last. Give --layout"),
        (("n", "c", "h", "w"), LONE, "leaves open where the channels.* are: give --layout"),
        (("n", 3, "h", "w"), LONE, "must be at least 1; give --image_size"),
        (("n", 3, 6), LONE, "takes no images"),
    ],
)
def test_what_flags_cannot_mend_is_said_in_a_line(
    tmp_path: Path,
    rng: np.random.Generator,
    picture: Path,
    error_of,
    shape: Sequence[Any],
    flags: tuple[str, ...],
    message: str,
) -> None:
    net = write_onnx(tmp_path / "net.onnx", rng, shape)
    assert re.search(message, error_of(net, picture, *flags))


def test_other_kinds_of_input_are_refused(
    tmp_path: Path, rng: np.random.Generator, picture: Path, error_of
) -> None:
    shape = ("n", 3, SIZE, SIZE)
    for kind, message in (
        (TensorProto.UINT8, "takes pixels as they are, uint8, and normalizes them by itself"),
        (TensorProto.INT8, "takes images of tensor(int8), not of uint8 or float32"),
        (TensorProto.DOUBLE, "takes images of tensor(double), not of uint8 or float32"),
    ):
        net = write_onnx(tmp_path / "net.onnx", rng, shape, kind=kind)
        assert message in error_of(net, picture, *LONE)
    (tmp_path / "no.tflite").write_text("no network")
    assert "no.tflite cannot be read as a TFLite" in error_of(tmp_path / "no.tflite", picture)
    net = write_litert(tmp_path / "net.tflite", rng)
    assert "the outputs of" in error_of(net, picture, *LONE, "--output=x")
    assert "Give --mean and --std" in error_of(net, picture)


def test_names_of_others_win_over_those_in_a_file(
    tmp_path: Path, rng: np.random.Generator, picture: Path, error_of
) -> None:
    for in_file in ('["a", "b", "c", "d"]', "no JSON"):
        net = write_onnx(
            tmp_path / "net.onnx",
            rng,
            ("n", 3, SIZE, SIZE),
            metadata={"class_names": in_file, "mean": "[0, 0, 0]", "std": "unknown"},
        )
        told = Told(mean=MEAN, std=STD, class_names=tuple("wxyz"))
        assert read_classifier(net, told).class_names == tuple("wxyz")
    assert "The class_names of" in error_of(net, picture, *LONE)


def test_files_of_names_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    with pytest.raises(ValueError, match="is no regular file"):
        read_class_names(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_class_names(path)
    for content, message in (
        (b"", "has no name in line 1"),
        (b"a\n\nb\n", "has no name in line 2"),
        (b"a\n\xff\n", "is no text in UTF-8"),
        (b"a\n" * (2**21 + 1), "has more than 4194304 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_class_names(path)


def test_pictures_that_are_none_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "it.png"
    os.mkfifo(path)  # which would be waited for
    with pytest.raises(ValueError, match=r"it\.png is no regular file"):
        read_picture(path, (8, 8, 1))
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # a sparse one
    with pytest.raises(ValueError, match="has more than 268435456 bytes"):
        read_picture(path, (8, 8, 1))


def test_metadata_of_others_count_where_they_mean_the_same(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """`mean` and `std` of files that are not ours may be in any unit."""
    metadata = {"class_names": json.dumps(list("abcd")), "mean": "[123, 116, 103]", "std": "[1]"}
    net = write_onnx(tmp_path / "net.onnx", rng, ("n", 3, SIZE, SIZE), metadata=metadata)
    assert read_classifier(net, NORMALIZED).class_names == tuple("abcd")
