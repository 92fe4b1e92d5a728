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


def test_whatever_is_damaged_or_of_before_is_made_again(images, tmp_path, rng):
    path = tmp_path / "decoded.npz"
    cached(path, lambda: images)
    whole = path.read_bytes()
    damaged = [b"", b"no zip", whole[: len(whole) // 2]]
    for place in rng.integers(0, len(whole), 60):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(changed))
    for data in damaged:
        path.write_bytes(data)
        again = cached(path, lambda: images)
        np.testing.assert_array_equal(again.images, images.images)
        np.testing.assert_array_equal(again.labels, images.labels)
    np.savez(path, images=0 * images.images, labels=images.labels)  # as files were decoded before
    assert cached(path, lambda: images) is images
    assert cached(path, never).images.any()
