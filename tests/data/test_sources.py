import tarfile
import zipfile

import pytest

from ab_jax.data.sources import ImageFile, check_source, read_images, scan


def pack(source, archive):
    """Packs a folder into an archive whose kind the name tells."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for file in files:
                packed.write(file, file.relative_to(source))
    else:
        with tarfile.open(archive, f"w:{archive.suffix.lstrip('.').replace('tar', '')}") as packed:
            for file in files:
                packed.add(file, file.relative_to(source))
    return archive


@pytest.mark.parametrize("kind", ["", "a.zip", "a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"])
def test_directories_and_archives_hold_the_same(image_folder, tmp_path, kind):
    source, pixels = image_folder({"train": 3, "test": 1})
    packed = pack(source, tmp_path / kind) if kind else source
    assert scan(packed).counts == {"train": {"ant": 3, "bee": 3}, "test": {"ant": 1, "bee": 1}}
    for split in ("train", "test"):
        found = dict(read_images(packed, split))
        assert {file.name for file in found} == {name for name in pixels if name.startswith(split)}
        for file, encoded in found.items():
            assert encoded == (source / file.name).read_bytes()


@pytest.mark.parametrize("alias", ["val", "valid", "validation"])
def test_names_of_the_validation_split(image_folder, alias):
    source, _ = image_folder({"train": 1, alias: 2})
    assert scan(source).counts["validation"] == {"ant": 2, "bee": 2}
    files = [file for file, _ in read_images(source, "validation")]
    assert files[0] == ImageFile("validation", "ant", "validation/ant/0.png")


def test_wrapping_and_nested_directories(image_folder, tmp_path):
    source, _ = image_folder({"train": 2, "test": 1})
    (source / "train/ant").rename(source / "moved")
    (source / "train/ant").mkdir()
    (source / "moved").rename(source / "train/ant/deeper")
    contents = scan(source.parent)  # one directory more before the split
    assert contents.class_names == ("ant", "bee")
    assert contents.counts["train"] == {"ant": 2, "bee": 2}
    names = [file.name for file, _ in read_images(source.parent, "train")]
    assert "train/ant/deeper/0.png" in names


def test_what_is_no_image_of_a_split_is_reported(image_folder):
    source, _ = image_folder({"train": 1, "test": 1})
    ignored = ("README.txt", "extra/cat/0.png", "train/ant/.hidden.png", "train/stray.png")
    for name in ignored:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"no image")
    assert sorted(scan(source).ignored) == sorted(ignored)


def test_linked_class_directories_are_followed(image_folder):
    source, _ = image_folder({"train": 2, "test": 1})
    (source / "train/ant").rename(source.parent / "elsewhere")
    (source / "train/ant").symlink_to(source.parent / "elsewhere")
    assert scan(source).counts["train"] == {"ant": 2, "bee": 2}


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such file or directory: {tmp_path}/none"):
        check_source(tmp_path / "none")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "images.rar").touch()
    with pytest.raises(ValueError, match=r"images.rar is neither a directory nor an archive \(.*"):
        check_source(tmp_path / "images.rar")


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"])
def test_a_damaged_archive_is_named(image_folder, tmp_path, rng, kind):
    source, _ = image_folder({"train": 20, "test": 1})
    archive = pack(source, tmp_path / kind)
    whole = archive.read_bytes()
    # Wherever it is cut off, and not only within a file. An uncompressed archive of these ends in
    # at most 10,240 zeros, which may be missing.
    end = len(whole) - (10_500 if kind == "a.tar" else 1)
    cuts = [*rng.integers(0, end, 15), end]
    for cut in cuts:
        archive.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{kind} is a damaged archive"):
            scan(archive)
    archive.write_bytes(b"no archive" * 1000)
    with pytest.raises(ValueError, match=f"{kind} is a damaged archive"):
        scan(archive)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz", "a.tar.xz", "a.tar.bz2"])
def test_a_changed_byte_in_an_archive_is_noticed(image_folder, tmp_path, rng, kind):
    source, _ = image_folder({"train": 20, "test": 1})
    archive = pack(source, tmp_path / kind)
    changed = bytearray(archive.read_bytes())
    # In the middle of the compressed images; in a zip file some bytes elsewhere mean nothing.
    start = changed.index(b"IDAT", len(changed) // 2) + 20 if kind == "a.zip" else len(changed) // 2
    changed[start] ^= int(rng.integers(1, 256))
    archive.write_bytes(changed)
    # An image that shows the damage may be read before the archive's checksum.
    with pytest.raises(ValueError, match=f"{kind} (is a damaged archive|is not a readable PNG)"):
        scan(archive)


def test_the_checksum_of_an_archive_is_verified(image_folder, tmp_path):
    """A changed pixel may leave a readable image: the end of the archive tells."""
    source, _ = image_folder({"train": 2, "test": 1})
    archive = pack(source, tmp_path / "a.tar.gz")
    changed = bytearray(archive.read_bytes())
    changed[-8] ^= 1  # the checksum itself
    archive.write_bytes(changed)
    with pytest.raises(ValueError, match=r"a.tar.gz is a damaged archive: CRC check failed"):
        scan(archive)


@pytest.mark.parametrize("where", ["offset", "offset_data"])
def test_zeros_within_a_tar_are_noticed(image_folder, tmp_path, where):
    """In a member's header, where `tarfile` would take them for the end, and in its image."""
    source, _ = image_folder({"train": 20, "test": 1})
    archive = pack(source, tmp_path / "a.tar")
    with tarfile.open(archive) as packed:
        start = getattr(packed.getmembers()[7], where)
    changed = bytearray(archive.read_bytes())
    changed[start : start + 64] = bytes(64)
    archive.write_bytes(changed)
    with pytest.raises(ValueError, match=r"a.tar (is a damaged archive|is not a readable PNG)"):
        scan(archive)


def test_a_damaged_image_is_named(image_folder):
    source, _ = image_folder({"train": 2, "test": 1})
    path = source / "train/bee/1.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"train/bee/1.png in .* is not a readable PNG or JPEG"):
        scan(source)


@pytest.mark.parametrize(
    ("splits", "found"),
    [({"test": 1}, "found test"), ({"train": 1}, "found train"), ({}, "no such")],
)
def test_missing_splits_are_named(image_folder, tmp_path, splits, found):
    image_folder(splits)
    (tmp_path / "source").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=f"must hold train/class/file and .*{found}"):
        scan(tmp_path / "source")


def test_splits_with_different_classes_are_refused(image_folder):
    source, _ = image_folder({"train": 1, "test": 1})
    (source / "test/bee").rename(source / "test/wasp")
    with pytest.raises(ValueError, match=r"train and test must have the same classes, but bee"):
        scan(source)


def test_two_files_of_one_name_are_refused(image_folder):
    source, _ = image_folder({"train": 1, "val": 1})
    (source / "val").rename(source / "validation")
    image_folder({"val": 1})
    with pytest.raises(ValueError, match=r"holds two files validation/ant/0.png"):
        scan(source)
