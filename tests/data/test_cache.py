import os

import numpy as np
import pytest

from ab_jax.data import Images
from ab_jax.data.cache import cached


@pytest.fixture
def images(rng):
    return Images(rng.integers(0, 256, (3, 4, 4, 3), np.uint8), rng.integers(0, 9, 3, np.int32))


def never():
    raise AssertionError("decoded again")


def test_the_second_call_reads_what_the_first_wrote(images, tmp_path):
    path = tmp_path / "decoded.npz"
    assert cached(path, lambda: images) is images
    again = cached(path, never)
    np.testing.assert_array_equal(again.images, images.images)
    np.testing.assert_array_equal(again.labels, images.labels)
    assert os.listdir(tmp_path) == ["decoded.npz"]


def test_a_directory_that_cannot_be_written_costs_only_time(images, tmp_path):
    assert cached(tmp_path / "missing" / "decoded.npz", lambda: images) is images


def test_a_write_that_fails_leaves_nothing_behind(images, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert cached(tmp_path / "decoded.npz", lambda: images) is images
    assert os.listdir(tmp_path) == []
