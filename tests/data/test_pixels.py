import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from ab_jax.data.pixels import box_downsample, decode


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_decode_gives_back_the_pixels_of_a_png(rng):
    pixels = rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), "PNG"), "x"), pixels)


def test_gray_images_become_rgb(rng):
    gray = rng.integers(0, 256, (3, 5), dtype=np.uint8)
    rgb = np.stack([gray] * 3, axis=-1)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(gray), "PNG"), "x"), rgb)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_named(rng, kind, damage):
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels), kind)
    data = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image"}[damage]
    with pytest.raises(ValueError, match=r"train/cat/7.jpg is not a readable PNG or JPEG image"):
        decode(data, "train/cat/7.jpg")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "JPEG2000"])
def test_other_formats_are_refused(rng, kind):
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"x.jpg is not a readable PNG or JPEG image"):
        decode(encoded(Image.fromarray(pixels), kind), "x.jpg")


@pytest.mark.parametrize("size", [1, 2, 3, 6, 12])
def test_box_downsample_is_the_rounded_mean_of_each_box(rng, size):
    image = rng.integers(0, 256, (12, 12, 2), dtype=np.uint8)
    small = box_downsample(image, size, "x")
    assert small.dtype == np.uint8
    assert small.shape == (size, size, 2)
    box = 12 // size
    for row, column, channel in np.ndindex(small.shape):
        part = image[row * box : (row + 1) * box, column * box : (column + 1) * box, channel]
        mean = Fraction(int(part.sum()), box * box)
        assert small[row, column, channel] == int(mean + Fraction(1, 2))  # halves go up


def test_box_downsample_reaches_both_ends_of_the_range():
    white = np.full((64, 64, 1), 255, np.uint8)
    assert (box_downsample(white, 1, "x") == 255).all()
    assert (box_downsample(0 * white, 1, "x") == 0).all()


@pytest.mark.parametrize("shape", [(12, 12, 3), (10, 5, 3), (2, 2, 3)])
def test_box_downsample_refuses_what_does_not_divide(shape):
    message = f"image_size=5 must divide .* a.png has {shape[0]} x {shape[1]} pixels"
    with pytest.raises(ValueError, match=message):
        box_downsample(np.zeros(shape, np.uint8), 5, "a.png")
