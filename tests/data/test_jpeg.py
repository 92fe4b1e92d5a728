"""Photographs to square images: decoding, random parts and centers, against independent ones."""

import io
import struct
import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image

from ab_jax.data import jpeg
from ab_jax.data.jpeg import decode_photo
from ab_jax.data.pixels import decode


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{"format": "JPEG", "quality": 90, **options})
    return buffer.getvalue()


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def ramps(height: int, width: int) -> np.ndarray:
    """Each pixel holds its row, its column and nothing."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)


def random_resized_crop(
    image: np.ndarray, size: int, rng: np.random.Generator, *, flip: bool
) -> np.ndarray:
    square = np.empty((3, size, size, 3), np.uint8)  # in the middle of a batch
    jpeg.random_resized_crop(image, square[1], rng, flip=flip)
    return square[1]


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    square = np.empty((size, size, 3), np.uint8)
    jpeg.center_crop(image, square)
    return square


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_decodes_as_pillow_does(rng: np.random.Generator, options: dict[str, object]) -> None:
    file = encoded(smooth(rng, 37, 53), **options)
    with Image.open(io.BytesIO(file)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    got = decode_photo(file, "a")
    assert got.dtype == np.uint8
    # The two use the same library in other versions, whose upsampling of colours may differ.
    assert np.abs(got - expected).max() <= 3


def test_gray_palette_and_rotated_files_become_rgb_as_stored(rng: np.random.Generator) -> None:
    gray = rng.integers(0, 256, (9, 7)).astype(np.uint8)
    assert decode_photo(encoded(gray), "a").shape == (9, 7, 3)
    png = decode_photo(encoded(gray, format="PNG", quality=None), "a")
    np.testing.assert_array_equal(png, np.repeat(gray[..., None], 3, axis=-1))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode_photo(encoded(gray, exif=exif), "a").shape == (9, 7, 3)


def test_a_file_that_is_cut_off_is_refused_by_name(rng: np.random.Generator) -> None:
    file = encoded(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    for stop in [0, 1, 2, *rng.integers(3, len(file) - 8, 20)]:
        with pytest.raises(ValueError, match=r"n01440764_10026\.JPEG"):
            decode_photo(file[:stop], "n01440764_10026.JPEG")


def test_a_file_that_lacks_its_last_bytes_is_refused_or_has_every_pixel(
    rng: np.random.Generator,
) -> None:
    # The last byte before the marker of two bytes may hold nothing but padding.
    for _ in range(200):
        file = encoded(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8))
        whole = decode_photo(file, "a")
        for stop in range(len(file) - 8, len(file)):
            try:
                image = decode_photo(file[:stop], "a")
            except ValueError:
                continue
            # Pillow and OpenCV use the same library in other versions.
            assert np.abs(image.astype(int) - whole).max() <= 3


def test_bytes_behind_the_end_are_harmless(rng: np.random.Generator) -> None:
    file = encoded(smooth(rng, 20, 30))
    assert decode_photo(file + b"\0 more", "a").shape == (20, 30, 3)


def test_random_parts_have_the_area_and_the_ratio(rng: np.random.Generator) -> None:
    height, width, size = 180, 180, 60  # square, so that wide parts fit in as often as high ones
    shares, aspects, flips, corners = [], [], 0, []
    for _ in range(1000):
        part = random_resized_crop(ramps(height, width), size, rng, flip=True).astype(float)
        assert part.shape == (size, size, 3)
        left_to_right = part[0, -1, 1] > part[0, 0, 1]
        flips += not left_to_right
        # From the middle of the first pixel to that of the last lie size - 1 of size pixels.
        h = (part[-1, 0, 0] - part[0, 0, 0]) * size / (size - 1)
        w = abs(part[0, -1, 1] - part[0, 0, 1]) * size / (size - 1)
        shares.append(h * w / (height * width))
        aspects.append(w / h)
        corners.append(part[0, 0, 0] / (height - h) if height - h > 20 else np.nan)
    # Pixels are whole numbers, which these estimates feel: within 10 %.
    assert 0.07 < min(shares) < 0.11
    assert max(shares) < 1.05
    assert 0.67 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.5
    assert np.median(aspects) == pytest.approx(1, abs=0.05)  # as often upright as not
    assert flips == pytest.approx(500, abs=80)  # five deviations
    assert np.nanmean(corners) == pytest.approx(0.5, abs=0.08)  # anywhere in the photograph


def test_without_flips_nothing_is_mirrored(rng: np.random.Generator) -> None:
    for _ in range(50):
        part = random_resized_crop(ramps(50, 60), 20, rng, flip=False).astype(int)
        assert part[0, -1, 1] > part[0, 0, 1]


@pytest.mark.parametrize(("height", "width"), [(4, 250), (250, 4), (1, 1)])
def test_no_photograph_is_too_narrow(rng: np.random.Generator, height: int, width: int) -> None:
    for _ in range(20):
        part = random_resized_crop(ramps(height, width), 8, rng, flip=False)
        assert part.shape == (8, 8, 3)


def test_the_center_is_seven_eighths_averaged(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (256, 320, 3)).astype(np.uint8)
    expected = image[16:240, 48:272].reshape(112, 2, 112, 2, 3).mean((1, 3))
    assert np.abs(center_crop(image, 112) - expected).max() <= 0.5
    np.testing.assert_array_equal(center_crop(image, 224), image[16:240, 48:272])


def test_small_photographs_are_enlarged(rng: np.random.Generator) -> None:
    image = np.full((8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(center_crop(image, 20), np.full((20, 20, 3), 77))


def declaring(file: bytes, width: int, height: int) -> bytes:
    """A JPEG file whose header says another size."""
    frame = next(i for i in range(len(file)) if file[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return file[: frame + 5] + struct.pack(">HH", height, width) + file[frame + 9 :]


@pytest.mark.parametrize("size", [(13_000, 13_000), (65_535, 65_535), (9_460, 9_460)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 60_000}])
@pytest.mark.parametrize("fill", [b"", b"\xff"])  # before a marker, of any number
def test_too_many_declared_pixels_are_refused_before_decoding(
    rng: np.random.Generator, size: tuple[int, int], options: dict[str, object], fill: bytes
) -> None:
    pixels = smooth(rng, 64, 64)
    file = encoded(pixels, **options)
    whole = file[:2] + fill + file[2:]
    assert decode_photo(whole, "a").shape == (64, 64, 3)
    large = declaring(file, *size)
    tracemalloc.start()
    for read in (decode_photo, decode):
        words = f"a.jpg is not .*declares {size[0]:,} x {size[1]:,} pixels, and at most 89,478,485"
        with pytest.raises(ValueError, match=words):
            read(large[:2] + fill + large[2:], "a.jpg")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
