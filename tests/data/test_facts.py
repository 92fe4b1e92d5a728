"""What a record tells of its data: names and numbers that an exported network needs."""

import json

import numpy as np
import pytest

from ab_jax.data import Dataset, Images, load
from ab_jax.data import image_folder as builders
from ab_jax.data.image_folder import CIFAR10_CLASSES
from ab_jax.data.load import facts
from ab_jax.data.prepare import prepare_cifar10_jpeg, prepare_image_folder
from ab_jax.data.stream import load_stream


def test_facts_are_json_and_those_of_the_training_images(rng: np.random.Generator) -> None:
    def images(count: int) -> Images:
        pixels = rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
        return Images(pixels, np.zeros(count, np.int32))

    made = Dataset(
        name="made up",
        version="1.2.3",
        train=images(3),
        validation=images(2),
        test=images(1),
        class_names=("a", "ü"),
        mean=(0.1, 1 / 3, 2 / 3),
        std=(0.5, 2 / 3, 1.0),
    )
    assert json.loads(json.dumps(facts(made))) == {
        "name": "made up",
        "version": "1.2.3",
        "images": {"train": 3, "validation": 2, "test": 1},
        "classes": 2,
        "class_names": ["a", "ü"],
        "image_shape": [4, 4, 3],
        "mean": [0.1, 0.333333, 0.666667],
        "std": [0.5, 0.666667, 1.0],
    }


def test_digits_have_their_names_and_the_numbers_they_are_normalized_by() -> None:
    for classes in (None, 3):
        data = load("digits", classes=classes)
        told = facts(data)
        assert told["class_names"] == list("0123456789")[:classes]
        pixels = data.train.images / 255
        np.testing.assert_allclose(told["mean"], pixels.mean((0, 1, 2)), atol=5.01e-7)
        np.testing.assert_allclose(told["std"], pixels.std((0, 1, 2)), atol=5.01e-7)


def test_a_folder_has_the_names_of_its_directories(image_folder, tmp_path) -> None:
    source, _ = image_folder({"train": 4, "val": 2}, classes=("ant", "bee", "cicada"), size=4)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    names = ["ant", "bee", "cicada"]
    for classes in (None, 2):
        told = facts(load("image_folder:bugs", data_dir=tmp_path / "data", classes=classes))
        assert told["class_names"] == names[:classes]
    stream = load_stream("image_folder:bugs", image_size=4, data_dir=tmp_path / "data")
    told = facts(stream)
    assert told["class_names"] == names
    # Those of ImageNet, as published.
    assert (told["mean"], told["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_cifar10_has_its_names(image_folder, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"train": 3, "test": 1}
    monkeypatch.setattr(builders, "CIFAR10_COUNTS", counts)
    source, _ = image_folder(counts, classes=CIFAR10_CLASSES[::-1], size=4)
    prepare_cifar10_jpeg(source, tmp_path / "data")
    told = facts(load("cifar10_jpeg", data_dir=tmp_path / "data"))
    expected = "airplane automobile bird cat deer dog frog horse ship truck"
    assert told["class_names"] == expected.split()
