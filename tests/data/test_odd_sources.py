"""Sources that are odd, or made to do harm: names, sizes, encryption. Each ends in one message."""

import contextlib
import io
import os
import re
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from ab_jax.data.prepare import main, prepare_image_folder
from ab_jax.data.sources import read_images, scan

LARGE = 3 * 2**30  # bytes


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
FILES = {f"{split}/{name}/0.png": PNG for split in ("train", "test") for name in ("ant", "bee")}


def tar(path: Path, files: dict[str, bytes], mode: str = "", **options: object) -> Path:
    with tarfile.open(path, f"w:{mode}", **options) as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def patched(path: Path, change: Callable[[bytearray, int, int], None]) -> Path:
    """Changes the first file's two headers: `change(archive, its own, its in the directory)`."""
    content = bytearray(path.read_bytes())
    change(content, content.index(b"PK\3\4"), content.index(b"PK\1\2"))
    path.write_bytes(content)
    return path


@contextlib.contextmanager
def little_memory(most: int = 2**24) -> Iterator[None]:
    """Fails where more bytes are held at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# Sizes: by what is declared, before anything is read


def large_tar(path: Path, mode: str, sparse: bool) -> Path:
    """Of a file that declares 3 GiB there is little; whoever reads it says that it is damaged."""
    with tarfile.open(path, f"w:{mode}", format=tarfile.PAX_FORMAT) as packed:
        member = tarfile.TarInfo("train/ant/0.png")
        if sparse:
            keys = {"major": "1", "minor": "0", "name": member.name, "realsize": str(LARGE)}
            member.pax_headers = {f"GNU.sparse.{key}": value for key, value in keys.items()}
            member.size = 512
            packed.addfile(member, io.BytesIO(f"1\n{LARGE}\n0\n".encode().ljust(512, b"\0")))
        else:
            member.size = LARGE
            packed.fileobj.write(member.tobuf())
    return path


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["", "gz", "xz", "bz2"])
def test_a_large_file_in_a_tar_is_refused_before_it_is_read(tmp_path, mode, sparse):
    archive = large_tar(tmp_path / "a.tar", mode, sparse)
    with little_memory(2**26), pytest.raises(ValueError, match="3,221,225,472 bytes, and at most"):
        scan(archive)


def test_a_large_file_in_a_zip_is_refused_before_it_is_read(tmp_path):
    def change(archive: bytearray, own: int, directory: int) -> None:
        struct.pack_into("<I", archive, own + 22, LARGE)
        struct.pack_into("<I", archive, directory + 24, LARGE)

    archive = patched(zipped(tmp_path / "a.zip", FILES), change)
    with pytest.raises(ValueError, match=r"train/ant/0.png in .*a.zip has 3,221,225,472 bytes"):
        scan(archive)


def test_a_zip_that_holds_more_than_it_declares_is_not_unpacked(tmp_path):
    def change(archive: bytearray, own: int, directory: int) -> None:
        struct.pack_into("<I", archive, own + 22, 100)
        struct.pack_into("<I", archive, directory + 24, 100)

    large = {**FILES, "train/ant/0.png": bytes(2**26)}
    archive = patched(zipped(tmp_path / "a.zip", large), change)
    with little_memory(), pytest.raises(ValueError, match=r"a.zip is a damaged archive"):
        list(read_images(archive, "train"))


def test_a_large_file_in_a_directory_is_refused_before_it_is_read(image_folder):
    source, _ = image_folder({"train": 1, "test": 1})
    os.truncate(source / "train/ant/0.png", LARGE)  # takes no room on the disk
    with little_memory(), pytest.raises(ValueError, match=r"0.png in .* has 3,221,225,472 bytes"):
        scan(source)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_large_header_in_a_tar_is_refused_before_it_is_read(tmp_path, kind):
    member = tarfile.TarInfo("long")
    member.type, member.size = kind, 2**26
    content = member.tobuf(tarfile.USTAR_FORMAT) + bytes(2**26)
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(zlib.compress(content, 1, wbits=31))
    with little_memory(), pytest.raises(ValueError, match="headers claim 67,108,864 bytes"):
        scan(archive)


def test_a_large_file_that_counts_for_nothing_is_skipped(tmp_path):
    files = {"junk.bin": bytes(2**25), ".git/large.png": bytes(2**25)} | FILES
    archive = tar(tmp_path / "a.tar.gz", files, "gz", compresslevel=1)
    del files
    with little_memory():
        assert set(scan(archive).ignored) == {"junk.bin", ".git/large.png"}


def test_a_header_that_leads_backwards_ends_no_reader(tmp_path):
    member = tarfile.TarInfo("train/ant/0.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with pytest.raises(ValueError, match=r"a.tar is a damaged archive"):
        scan(tmp_path / "a.tar")


# Names of members


@pytest.mark.parametrize("name", [".", "", "/", "./", "//.", "..", "../train/ant/1.png"])
@pytest.mark.parametrize("kind", ["a.tar", "a.zip"])
def test_members_without_a_name_or_above_the_root_are_left_out(tmp_path, name, kind):
    files = FILES | {name: PNG}
    archive = tar(tmp_path / kind, files) if kind == "a.tar" else zipped(tmp_path / kind, files)
    assert scan(archive).counts == {s: {"ant": 1, "bee": 1} for s in ("train", "test")}


@pytest.mark.parametrize("kind", ["a.tar", "a.zip"])
def test_absolute_names_are_below_the_root(tmp_path, kind):
    files = {f"/{name}": content for name, content in FILES.items()}
    archive = tar(tmp_path / kind, files) if kind == "a.tar" else zipped(tmp_path / kind, files)
    assert {file.name for file, _ in read_images(archive, "test")} == set(FILES) - {
        "train/ant/0.png",
        "train/bee/0.png",
    }
    files["train/ant/0.png"] = PNG  # the same file by another name
    archive = tar(tmp_path / kind, files) if kind == "a.tar" else zipped(tmp_path / kind, files)
    with pytest.raises(ValueError, match=r"holds two files train/ant/0.png"):
        scan(archive)


def test_a_file_name_that_is_no_utf8_is_refused(image_folder, tmp_path):
    source, _ = image_folder({"train": 1, "test": 1})
    os.rename(source / "train/ant/0.png", os.fsencode(source) + b"/train/ant/\xe9.png")
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        packed.add(source, ".")
    for held in (source, tmp_path / "a.tar"):
        with pytest.raises(ValueError, match=r"the file name train/ant/\\udce9.png is no UTF-8"):
            prepare_image_folder(held, "bugs", tmp_path / "data")


def test_a_left_out_name_that_is_no_utf8_or_has_lines_is_shown(image_folder, tmp_path, capsys):
    source, _ = image_folder({"train": 1, "test": 1})
    Path(os.fsdecode(os.fsencode(source) + b"/\xe9\n.txt")).touch()
    prepare_image_folder(source, "bugs", tmp_path / "data")
    assert "such as \\udce9\\n.txt\n" in capsys.readouterr().out


def test_names_in_a_zip_are_utf8_where_they_can_be(tmp_path):
    """Whether it says so or not; else in code page 437, as the format has it."""

    def named(raw: bytes, flag: int) -> Path:
        def change(archive: bytearray, own: int, directory: int) -> None:
            del own, directory
            for start, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
                place = archive.find(start)
                while place >= 0:
                    struct.pack_into("<H", archive, place + offset, flag)
                    place = archive.find(start, place + 1)
            archive[:] = archive.replace(b"bee", raw)

        return patched(zipped(tmp_path / "a.zip", FILES), change)

    assert scan(named("bé".encode(), 0)).class_names == ("ant", "bé")
    assert scan(named("bé".encode(), 0x800)).class_names == ("ant", "bé")
    assert scan(named("béé".encode("cp437"), 0)).class_names == ("ant", "béé")
    with pytest.raises(ValueError, match=r"a.zip is a damaged archive: .*utf-8"):
        scan(named(b"b\xe9e", 0x800))


@pytest.mark.parametrize(
    ("flag", "method", "words"),
    [(1, None, "train/ant/0.png in .*a.zip is encrypted: unpack"), (0, 9, "cannot be unpacked")],
)
def test_a_zip_that_cannot_be_unpacked_says_so(tmp_path, flag, method, words):
    def change(archive: bytearray, own: int, directory: int) -> None:
        archive[own + 6] |= flag
        archive[directory + 8] |= flag
        if method is not None:
            archive[own + 8] = archive[directory + 10] = method

    archive = patched(zipped(tmp_path / "a.zip", FILES), change)
    with pytest.raises(SystemExit) as ended:
        main(["image_folder", f"--source={archive}", "--name=bugs", f"--data_dir={tmp_path / 'd'}"])
    (line,) = str(ended.value).splitlines()
    assert line.startswith("error: ")
    with pytest.raises(ValueError, match=words):
        scan(archive)


def test_a_damaged_archive_of_any_kind_ends_in_one_message(tmp_path, rng):
    """Changed bytes, most of them in headers, whose checksums are put right."""
    link = tarfile.TarInfo("train/ant/1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "0.png"
    whole = {}
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tar(tmp_path / "a.tar", FILES | {"l" * 150: b""}, format=format)
        with tarfile.open(path, "a", format=format) as packed:
            packed.addfile(link)
        whole[f"{format}.tar"] = path.read_bytes()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = zipped(tmp_path / "a.zip", FILES, method)
        whole[f"{method}.zip"] = path.read_bytes()
    for _ in range(300):
        name = list(whole)[rng.integers(len(whole))]
        content = bytearray(whole[name])
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            if name.endswith(".tar"):
                place = min(place // 512 * 512 + rng.integers(160), len(content) - 1)
            content[place] = rng.choice([*range(256), *b"01234567" * 20])
        for start in range(0, len(content), 512):
            header = content[start : start + 512]
            if name.endswith(".tar") and header[257:262] == b"ustar":
                header[148:156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        (tmp_path / name).write_bytes(content)
        message = ""
        try:
            scan(tmp_path / name)
        except ValueError as error:
            message = str(error)
        assert not message or str(tmp_path / name) in message
        # One line, or a list of the images that cannot be read.
        first, *others = message.splitlines() or [""]
        assert not others or re.match(rf"{len(others)} images cannot be read", first)


# Names of classes


@pytest.mark.parametrize(
    "name",
    [
        *("bee\n", "b\nee", "b\tee", "b\x7fee", "b\u2028ee"),
        *("bee ", " bee", "\u3000bee", " ", "\u200b"),
        *("b\u202eee", "b\u2066ee", "\u200fbee"),
    ],
)
def test_class_names_that_a_table_cannot_show_are_refused(image_folder, name):
    source, _ = image_folder({"train": 1, "test": 1}, classes=("ant", name))
    with pytest.raises(ValueError, match="the class name '") as raised:
        scan(source)
    message = str(raised.value)
    assert message.isascii()
    assert message.isprintable()
    assert ascii(name) in message


@pytest.mark.parametrize(
    ("one", "other"),
    [("caf\u00e9", "cafe\u0301"), ("a b", "a  b"), ("a b", "a\u00a0b"), ("cat", "c\u200bat")],
)
@pytest.mark.parametrize("both", [True, False])
def test_two_classes_under_one_name_are_refused(image_folder, one, other, both):
    """In one split, or one in each, as where the splits were packed on two systems."""
    source, _ = image_folder({"train": 1, "test": 1}, classes=(one, other) if both else (one,))
    if not both:
        (source / f"test/{one}").rename(source / f"test/{other}")
    with pytest.raises(ValueError, match="look the same") as raised:
        scan(source)
    assert ascii(one) in str(raised.value)
    assert ascii(other) in str(raised.value)


def test_other_class_names_are_kept(image_folder, tmp_path):
    names = tuple(
        sorted(("Cat", "cat", "gato montés", "猫", "نمی\u200cدانم", "m²", "m2", "a, b|c"))
    )
    source, _ = image_folder({"train": 1, "test": 1}, classes=names)
    assert scan(source).class_names == names
    directory = prepare_image_folder(source, "cats", tmp_path / "data")
    written = (directory / "label.labels.txt").read_text(encoding="utf-8")
    assert tuple(written.splitlines()) == names


# Pixels


def test_an_image_that_declares_too_many_pixels_is_refused_in_a_folder(image_folder):
    source, _ = image_folder({"train": 1, "test": 1})
    content = bytearray((source / "train/ant/0.png").read_bytes())
    content[16:24] = struct.pack(">II", 13_000, 13_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (source / "train/ant/0.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"0.png in .* declares 13,000 x 13,000 pixels"):
        scan(source)
