import numpy as np
import pytest

from ab_jax.data import Dataset, Images
from ab_jax.data.dataset import channel_statistics


def images(n: int, shape: tuple[int, int, int] = (4, 4, 3), label: int = 0) -> Images:
    return Images(np.zeros((n, *shape), np.uint8), np.full(n, label, np.int32))


def dataset(**changes) -> Dataset:
    parts = {"train": images(3), "validation": images(2), "test": images(1)}
    values = {"class_names": ("a", "b"), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return Dataset(**({"name": "made up", "version": "1.0.0"} | parts | values | changes))


def test_images_select_by_slice_and_by_index(rng):
    pixels = rng.integers(0, 256, (5, 2, 2, 1), dtype=np.uint8)
    labels = rng.integers(0, 9, 5, dtype=np.int32)
    whole = Images(pixels, labels)
    assert len(whole) == 5
    for index in (slice(1, 4), np.array([4, 0])):
        np.testing.assert_array_equal(whole[index].images, pixels[index])
        np.testing.assert_array_equal(whole[index].labels, labels[index])


@pytest.mark.parametrize(
    ("pixels", "labels", "error", "message"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros(2, np.int32), TypeError, "uint8, got float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), TypeError, "int32, got float64"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), ValueError, r"\(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32), ValueError, r"\(2,\).*\(3,\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), np.full(1, -1, np.int32), ValueError, "got -1"),
    ],
)
def test_images_refuse_wrong_arrays(pixels, labels, error, message):
    with pytest.raises(error, match=message):
        Images(pixels, labels)


def test_dataset_knows_its_shape_and_classes():
    made = dataset()
    assert made.num_classes == 2
    assert made.image_shape == (4, 4, 3)
    assert {part: len(images) for part, images in made.parts.items()} == {
        "train": 3,
        "validation": 2,
        "test": 1,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": images(1, shape=(5, 5, 3))}, r"test images have shape \(5, 5, 3\), train"),
        ({"validation": images(1, label=2)}, "validation holds label 2, but there are 2 class"),
        ({"mean": (0.0,)}, "3 channels, mean has 1 numbers and std has 3"),
    ],
)
def test_dataset_refuses_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_channel_statistics_are_numpys(rng):
    pixels = rng.integers(0, 256, (7, 5, 6, 3), dtype=np.uint8) // np.array([1, 2, 5], np.uint8)
    mean, std = channel_statistics(pixels)
    np.testing.assert_allclose(mean, (pixels / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (pixels / 255).std(axis=(0, 1, 2)), rtol=1e-12)
