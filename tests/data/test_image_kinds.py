"""Kinds of image files, for data sets, streams and `classify`: the right pixels, or none."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from ab_jax.data import load
from ab_jax.data.jpeg import decode_photo
from ab_jax.data.pixels import decode
from ab_jax.data.prepare import prepare_image_folder
from ab_jax.data.stream import load_stream
from experiments.exported.pictures import read_picture
from tests.data.image_files import deep_png, eight_bits, encoded, noted

SIZE = 9  # of the square images
Read = Callable[[bytes], np.ndarray]


@pytest.fixture(params=["data set", "stream", "classify"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Read:
    """Reads a file of an image of SIZE pixels."""

    def as_classify(file: bytes) -> np.ndarray:
        (tmp_path / "it.png").write_bytes(file)
        return read_picture(tmp_path / "it.png", (SIZE, SIZE, 3))

    return {
        "data set": lambda file: decode(file, "it.png"),
        "stream": lambda file: decode_photo(file, "it.png", upright=True),
        "classify": as_classify,
    }[request.param]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_scaled_to_8(read: Read, rng: np.random.Generator, channels: int) -> None:
    deep = rng.integers(0, 65536, (SIZE, SIZE, channels)).astype(np.uint16)
    deep[0, :5, 0] = [0, 128, 129, 65407, 65535]  # to 0, 0, 1, 254 or 255, 255
    np.testing.assert_array_equal(read(deep_png(deep)), eight_bits(deep))


def test_16_bits_of_gray_stay_gray_for_a_network_of_gray_images(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    deep = rng.integers(0, 65536, (SIZE, SIZE, 1)).astype(np.uint16)
    (tmp_path / "it.png").write_bytes(deep_png(deep))
    gray = read_picture(tmp_path / "it.png", (SIZE, SIZE, 1))
    np.testing.assert_array_equal(gray, eight_bits(deep)[..., :1])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_each_kind_gives_its_pixels(read: Read, rng: np.random.Generator, kind: str) -> None:
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    np.testing.assert_array_equal(read(encoded(pixels, kind)), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_images_stand_upright(
    read: Read, rng: np.random.Generator, kind: str, orientation: int
) -> None:
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    file = encoded(pixels, kind, **noted(orientation))
    with Image.open(io.BytesIO(file)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    # OpenCV and Pillow have the same JPEG library in other versions.
    np.testing.assert_allclose(read(file), expected, atol=3 if kind == "JPEG" else 0, rtol=0)


def test_deep_images_stand_upright(read: Read, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8)
    file = encoded(pixels.astype(np.uint16) * 257, "PNG", **noted(6))  # a quarter turn clockwise
    np.testing.assert_array_equal(read(file)[..., 0], np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_wide_images_become_high(rng: np.random.Generator, orientation: int) -> None:
    pixels = rng.integers(0, 256, (6, 11, 3)).astype(np.uint8)
    for kind in ("PNG", "JPEG"):
        file = encoded(pixels, kind, **noted(orientation))
        assert decode(file, "a").shape == (11, 6, 3)
        assert decode(file, "a", upright=False).shape == (6, 11, 3)
        assert decode_photo(file, "a", upright=True).shape == (11, 6, 3)
        assert decode_photo(file, "a").shape == (6, 11, 3)  # as ImageNet has it


def test_an_orientation_that_means_nothing_is_ignored(read: Read, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    for orientation in (0, 9, 65535):
        file = encoded(pixels, "PNG", **noted(orientation))
        np.testing.assert_array_equal(read(file), pixels)


def test_a_folder_of_every_kind_is_read_in_memory_and_as_a_stream(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)
    deep = pixels[2].astype(np.uint16) * 257
    files = {
        "0.webp": encoded(pixels[0], "WEBP"),
        "1.BMP": encoded(pixels[1], "BMP"),
        "2.png": deep_png(deep),
        "3.png": encoded(pixels[3], "PNG", **noted(6)),
    }
    upright = [*pixels[:3], np.rot90(pixels[3], -1)]
    for name, file in files.items():
        for split in ("train", "test"):
            path = tmp_path / "source" / split / name[0] / name
            path.parent.mkdir(parents=True)
            path.write_bytes(file)
    prepare_image_folder(tmp_path / "source", "kinds", tmp_path / "data")
    data = load("image_folder:kinds", data_dir=tmp_path / "data", validation=0)
    stream = load_stream(
        "image_folder:kinds", data_dir=tmp_path / "data", validation=0, image_size=SIZE
    )
    for part in ("train", "test"):
        images = data.parts[part]
        assert sorted(images.labels) == [0, 1, 2, 3]
        for image, label in zip(images.images, images.labels, strict=True):
            np.testing.assert_array_equal(image, upright[label])
        for image, label in getattr(stream, part).read(range(4)):
            np.testing.assert_array_equal(image, upright[label])


def test_an_error_names_the_file_and_no_buffer(read: Read) -> None:
    for file in (b"no image", b"", encoded(Image.new("RGB", (SIZE, SIZE)), "GIF")):
        with pytest.raises(ValueError, match=r"it\.png is not a readable PNG or JPEG") as error:
            read(file)
        assert "object at" not in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_a_pillow_without_webp_is_told(
    read: Read, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = encoded(rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8), "WEBP")
    monkeypatch.setattr(features, "check", lambda feature: feature != "webp")
    with pytest.raises(ValueError, match=r"it\.png .* WebP, which the Pillow .* without"):
        read(file)


# Pillow warns of tags that it cannot read, which matters no more than elsewhere.
@pytest.mark.filterwarnings("ignore::UserWarning", "error::PIL.Image.DecompressionBombWarning")
def test_damaged_files_give_pixels_or_one_kind_of_error(
    read: Read, rng: np.random.Generator
) -> None:
    """Bytes that are changed, left out and cut off, in files of every kind."""
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    files = [encoded(pixels, kind, **noted(8)) for kind in ("PNG", "WEBP", "JPEG")]
    files += [encoded(pixels, "BMP"), encoded(pixels, "JPEG", progressive=True)]
    files += [deep_png(rng.integers(0, 65536, (SIZE, SIZE, 3)).astype(np.uint16))]
    for file in files:
        for _ in range(30):
            damaged = bytearray(file)
            place = int(rng.integers(2, len(file)))
            match rng.integers(3):
                case 0:
                    damaged[place] = rng.integers(256)
                case 1:
                    del damaged[place : place + int(rng.integers(1, 9))]
                case 2:
                    del damaged[place:]
            try:
                found = read(bytes(damaged))
            except Image.DecompressionBombWarning:  # a size that nobody wants to wait for
                continue
            except ValueError as error:
                assert "it.png is not a readable PNG" in str(error)  # noqa: PT017
            else:
                assert found.dtype == np.uint8
                assert found.ndim == 3


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_more_pixels_than_a_file_may_declare_are_refused(read: Read, mode: str) -> None:
    """In one line, and before any of them is decoded."""
    buffer = io.BytesIO()
    Image.new(mode, (64, 64)).save(buffer, "JPEG")
    file = bytearray(buffer.getvalue())
    frame = file.index(b"\xff\xc0")
    file[frame + 5 : frame + 9] = (13_000).to_bytes(2) * 2
    with pytest.raises(ValueError, match=r"it\.png is not a readable .*pixels") as refused:
        read(bytes(file))
    assert len(str(refused.value).splitlines()) == 1
