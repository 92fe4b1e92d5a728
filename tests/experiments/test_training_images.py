"""ImageNet's networks trained a little further on: which images are in which part."""

import jax.numpy as jnp
import numpy as np
import pytest

from ab_jax.data.augment import normalize
from experiments.pretrained import training_images
from experiments.pretrained.images import drawn, resized
from experiments.pretrained.photographs import Photographs
from experiments.pretrained.pretrained_models import PUBLISHED
from experiments.settings.config import Config
from experiments.settings.datasets import load_dataset
from tests.experiments.test_pretrained_images import NUMBERED
from tests.experiments.test_pretrained_images import colours as colours
from tests.experiments.test_pretrained_images import tiny as tiny


@pytest.fixture
def load(tiny, colours, tmp_path, monkeypatch):
    """Loads a data set by its name; beside it Tiny ImageNet, and photographs of seven classes."""
    monkeypatch.setattr(training_images, "CALIBRATION", 6)
    monkeypatch.setattr(training_images, "_TEST", 4)
    colours(tmp_path / "photographs", *NUMBERED)
    monkeypatch.setenv("AB_JAX_PHOTOGRAPHS", str(tmp_path / "photographs"))

    def loaded(name, **flags):
        dataset = f"experiments.pretrained.training_images:{name}"
        return load_dataset(Config(dataset=dataset, data_dir=str(tmp_path / "data"), **flags))

    return loaded


def pixels(*sets):
    return np.concatenate([images.pixels() for images in sets])


def test_parts_are_those_that_calibrate_that_choose_and_that_are_read(load, tiny, tmp_path):
    images, _ = tiny
    photographs = Photographs(tmp_path / "photographs")
    found = load("both")
    assert found.num_classes == 1000
    assert found.image_shape == (224, 224, 3)
    wanted = images.calibration(6), photographs.calibration()
    labels = np.concatenate([part.labels for part in wanted])
    order = drawn(np.zeros(len(labels), int), None, 0)  # mixed
    np.testing.assert_array_equal(found.train.images, pixels(*wanted)[order])
    assert found.train.labels.tolist() == labels[order].tolist()
    np.testing.assert_array_equal(found.validation.images, pixels(images.choice()))
    np.testing.assert_array_equal(found.validation.labels, images.choice().labels)
    np.testing.assert_array_equal(found.test.images, pixels(photographs.test()))
    np.testing.assert_array_equal(found.test.labels, photographs.test().labels)
    assert len(load("photographs").train) == len(photographs.calibration())
    assert len(load("tiny").train) == 6


def test_tiny_imagenet_alone_needs_no_photographs(load, tiny, monkeypatch):
    monkeypatch.delenv("AB_JAX_PHOTOGRAPHS")
    found = load("tiny")
    every = tiny[0].test()
    of_all = {resized(every.images, 224)[i].tobytes(): every.labels[i] for i in range(len(every))}
    assert len(found.test) == 4
    assert [of_all[image.tobytes()] for image in found.test.images] == found.test.labels.tolist()
    for name in ("photographs", "both"):
        with pytest.raises(ValueError, match=r"AB_JAX_PHOTOGRAPHS names no images.*not passed on"):
            load(name)


@pytest.mark.parametrize(
    ("prefix", "network"), [("", "mobilenet_v1_025"), ("efficientnet_", "efficientnet_lite0")]
)
def test_pixels_are_as_the_network_was_trained(load, rng, prefix, network):
    found = load(f"{prefix}photographs")
    drawn = rng.integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
    seen = normalize(drawn, found.mean, found.std, jnp.float32)
    np.testing.assert_allclose(seen, PUBLISHED[network].normalize(drawn), atol=1e-5)


@pytest.mark.parametrize(
    ("flag", "value"), [("validation", 10), ("image_size", 64), ("classes", 5)]
)
def test_what_never_changes_is_no_flag(load, flag, value):
    with pytest.raises(ValueError, match=f"--{flag}={value} is not for"):
        load("tiny", **{flag: value})


def test_photographs_without_classes_are_refused(load, colours, tmp_path, monkeypatch):
    colours(tmp_path / "plain", "a.png", "b.png")
    monkeypatch.setenv("AB_JAX_PHOTOGRAPHS", str(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"no images to read|have no classes"):
        load("photographs")
