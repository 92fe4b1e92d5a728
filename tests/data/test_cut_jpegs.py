"""JPEGs that lack pixels but not the end marker: refused, and no whole file with them."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ab_jax.data.jpeg import decode_photo
from ab_jax.data.pixels import decode
from experiments.exported.pictures import read_picture
from tests.data.image_files import encoded

END = b"\xff\xd9"
DATA = Path(__file__).parents[3] / "shared" / "data"
KINDS = {
    "4:2:0": {},
    "4:4:4": {"subsampling": 0},
    "gray": {},
    "CMYK": {},
    "restarts": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
}


def photo(rng: np.random.Generator, kind: str) -> bytes:
    """Something with edges, colours and noise, as a JPEG."""
    height, width = (int(side) for side in rng.integers(60, 120, 2))
    coarse = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    mode = {"gray": "L", "CMYK": "CMYK"}.get(kind, "RGB")
    return encoded(Image.fromarray(noisy).convert(mode), "JPEG", quality=85, **KINDS[kind])


def scans(file: bytes) -> list[tuple[int, int]]:
    """Where the pixels of each scan start and end, in a file by Pillow."""
    found, start = [], 2
    while file[start : start + 2] != END:
        scan = file[start + 1] == 0xDA
        start += 2 + int.from_bytes(file[start + 2 : start + 4])
        if scan:
            end = start
            while file[end] != 0xFF or file[end + 1] in (0, *range(0xD0, 0xD8)):
                end += 1
            found.append((start, end))
            start = end
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_noticed_wherever_it_is(rng: np.random.Generator, kind: str) -> None:
    for _ in range(8):
        file = photo(rng, kind)
        decode(file, "whole")
        decode_photo(file, "whole")
        # The last block of a plain file, of at most 400 bytes, may end anywhere. The last bits of
        # the scans of a progressive file may be padding.
        spare = 16 if kind == "progressive" else 400
        long = [(start, end - spare) for start, end in scans(file) if end - start > spare]
        place = int(rng.integers(*long[int(rng.integers(len(long)))]))
        for read in (decode, decode_photo):
            with pytest.raises(ValueError, match=r"a/cut\.jpg is not a readable"):
                read(file[:place] + END, "a/cut.jpg")
        with pytest.raises(ValueError, match=r"a/cut\.jpg is not a readable"):
            decode_photo(file[:place] + END + b"more", "a/cut.jpg", upright=True)


def test_classify_refuses_half_a_photograph(tmp_path: Path, rng: np.random.Generator) -> None:
    file = photo(rng, "4:2:0")
    path = tmp_path / "half.jpg"
    path.write_bytes(file)
    assert read_picture(path, (32, 32, 3)).shape == (32, 32, 3)
    path.write_bytes(file[: sum(scans(file)[0]) // 2] + END)
    with pytest.raises(ValueError, match=r"half\.jpg is not .* ends before its last pixel"):
        read_picture(path, (32, 32, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_pass_that_are_as_gray_as_what_is_missing(kind: str) -> None:
    mode = {"gray": "L", "CMYK": "CMYK"}.get(kind, "RGB")
    gray = Image.new("RGB", (37, 41), (128, 128, 128)).convert(mode)
    file = encoded(gray, "JPEG", **KINDS[kind])
    for read in (decode, decode_photo):
        assert read(file, "gray").shape == (41, 37, 3)
        assert read(file + b"\0 more", "gray").shape == (41, 37, 3)


def test_a_thumbnail_is_not_taken_for_the_image(rng: np.random.Generator) -> None:
    """A small JPEG within the file, as cameras store it; the image itself is cut."""
    file = photo(rng, "4:2:0")
    thumbnail = b"Exif\0\0" + photo(rng, "4:2:0")[:5000]
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2) + thumbnail
    file = file[:2] + segment + file[2:]
    decode_photo(file, "whole")
    with pytest.raises(ValueError, match="cut is not a readable"):
        decode_photo(file[: sum(scans(file)[0]) // 2] + END, "cut")


def members(archive: Path, count: int) -> Iterator[tuple[str, bytes]]:
    if not archive.exists():
        pytest.skip(f"no {archive.name} in {archive.parent}")
    mode = "r:" if archive.suffix == ".tar" else "r|*"
    with tarfile.open(archive, mode) as opened:
        for member in opened:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                yield member.name, opened.extractfile(member).read()
                count -= 1
                if not count:
                    return


@pytest.mark.parametrize(
    ("archive", "count"),
    [
        ("pretrained/imagenet_photos_256.tar", 80),
        ("cifar10_jpeg.tar.xz", 400),
        ("tiny_imagenet_200.part1.tar.xz", 250),
    ],
)
def test_no_real_photograph_is_refused(archive: str, count: int, rng: np.random.Generator) -> None:
    cut = 0
    for name, file in members(DATA / archive, count):
        image = decode(file, name)
        with Image.open(io.BytesIO(file)) as expected:
            np.testing.assert_array_equal(image, np.asarray(expected.convert("RGB")))
        assert decode_photo(file, name).shape == image.shape
        start, end = scans(file)[-1]
        if end - start > 800 and cut < 25:
            cut += 1
            with pytest.raises(ValueError, match="is not a readable"):
                decode_photo(file[: int(rng.integers(start, end - 400))] + END, name)
