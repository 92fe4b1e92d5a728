"""Calibrated networks as ONNX files: their answers, what they name, what is refused at once."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import ab_jax as ab
from ab_jax.export.packed import read_packed
from experiments.exported.classifiers import from_onnx
from experiments.pretrained.calibrate_command import Config, rules_of, run
from experiments.pretrained.imagenet_classes import class_names
from experiments.pretrained.onnx_writing import normalization, onnx_bytes
from experiments.pretrained.photographs import Photographs
from experiments.pretrained.pretrained_models import PretrainedModel, pretrained_model
from tests.experiments.test_pretrained_command import network as network
from tests.experiments.test_pretrained_command import photographs as photographs


def test_a_file_has_the_answers_of_the_codes(network, photographs, tmp_path):
    out = tmp_path / "net.onnx"
    config = Config(
        network=network, bits=3, photographs=photographs, images=16, batch_size=8, out=out
    )
    record = run(config)
    assert record["bytes"]["file"] == out.stat().st_size
    packed = tmp_path / "net.safetensors"
    again = run(Config(**{**vars(config), "out": packed}))
    assert again["quantized"] == record["quantized"]
    model = pretrained_model(network, None)
    pixels = Photographs(photographs, model.size).test().pixels()
    params = ab.dequantize(read_packed(packed).variables["params"])
    wanted = np.asarray(model.forward(params, jnp.asarray(model.normalize(pixels))))
    classifier = from_onnx(out)
    assert classifier.image_shape == (model.size, model.size, 3)
    assert classifier.class_names is None  # 16 classes are not ImageNet's
    found = classifier.logits(pixels)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted[:, :8]).max())


def test_classes_are_named_where_they_are_those_of_imagenet(rng, tmp_path):
    head = rng.standard_normal((3, 1000)).astype(np.float32)
    model = PretrainedModel(
        forward=lambda params, images: images.mean((1, 2)) @ params["head"],
        params={"head": head},
        normalize=lambda pixels: (pixels.astype(np.float32) - 5) / 50,
        size=8,
    )
    codes = ab.quantize(model.params, ab.Rules([("head", ab.Uniform(bits=4))]))
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_bytes(model, codes, description={"network": "mine"}))
    classifier = from_onnx(path)
    assert classifier.class_names == class_names()
    pixels = rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    wanted = model.forward(ab.dequantize(codes), model.normalize(pixels))
    np.testing.assert_allclose(classifier.logits(pixels), wanted, rtol=1e-4, atol=1e-4)


def test_a_normalization_is_a_factor_and_a_shift_a_channel():
    mean, deviation = np.array([3.0, 100, 7]), np.array([50.0, 2, 200])
    model = PretrainedModel(
        forward=lambda params, images: images,
        params={},
        normalize=lambda pixels: ((pixels - mean) / deviation).astype(np.float32),
    )
    factor, shift = normalization(model)
    np.testing.assert_allclose(factor.ravel(), 1 / deviation, rtol=1e-6)
    np.testing.assert_allclose(shift.ravel(), -mean / deviation, rtol=1e-6)


def test_what_cannot_be_written_is_said_before_anything_is_calibrated(
    network, photographs, tmp_path, monkeypatch
):
    model = pretrained_model(network, None)
    squares = PretrainedModel(
        **{**vars(model), "normalize": lambda pixels: pixels.astype(np.float32) ** 2}
    )
    monkeypatch.setattr(
        "experiments.pretrained.calibrate_command.pretrained_model", lambda *_: squares
    )
    config = Config(network=network, photographs=tmp_path / "none", out=tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"factor and a shift .*--out=net\.safetensors"):
        run(config)


@pytest.mark.long
def test_mobilenet_at_four_bits_names_what_it_sees(pretrained_files, tmp_path):
    """The classes that the file names are those of the codes, and mostly what is to be seen."""
    photos = pretrained_files / "imagenet_photos_256.tar"
    config = Config(
        network="mobilenet_v1_025",
        weights_file=pretrained_files / "mobilenet_v1_025_224.safetensors",
        depthwise_bits=8,
        method="coordinate_descent",
        photographs=photos,
        images=32,
        out=tmp_path / "net.onnx",
        record=tmp_path / "record.json",
    )
    record = run(config)
    classifier = from_onnx(config.out)
    images = Photographs(photos, 224).test()[:64]
    found = classifier.probabilities(images.pixels()).argmax(-1)
    assert np.mean(found == images.labels) > 0.35
    bits = np.unpackbits(
        np.frombuffer(bytes.fromhex(record["right"]["photographs"]["quantized"]), np.uint8)
    )[:64]
    assert np.sum((found == images.labels) != bits) <= 1  # one may be on the border
    assert json.loads((tmp_path / "record.json").read_text())["bytes"]["file"] < 700_000
    model = pretrained_model("mobilenet_v1_025", config.weights_file)
    assert {q.bits for _, q in rules_of(config, model).rules if q} == {4, 8}
