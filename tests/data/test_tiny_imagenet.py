"""Tiny ImageNet in its original layout: unpacked, in one archive or in several, and damaged."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ab_jax.data import load, tiny_imagenet
from ab_jax.data.load import facts
from ab_jax.data.pixels import decode
from ab_jax.data.prepare import prepare_tiny_imagenet
from ab_jax.data.stream import load_stream

WNIDS = ("n01443537", "n01629819", "n02814860")
TRAIN, VALIDATION = 4, 2  # images of each class


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_imagenet, "CLASSES", len(WNIDS))
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": TRAIN, "validation": VALIDATION})


@pytest.fixture
def files(rng: np.random.Generator) -> dict[str, bytes]:
    """The data set's files by path; every fourth image is gray, as in the real one."""

    def jpeg(i: int) -> bytes:
        buffer = io.BytesIO()
        shape = (64, 64) if i % 4 == 3 else (64, 64, 3)
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    found = {
        f"train/{wnid}/images/{wnid}_{i}.JPEG": jpeg(i) for wnid in WNIDS for i in range(TRAIN)
    }
    found |= {f"train/{wnid}/{wnid}_boxes.txt": b"x 0 0 1 1\n" for wnid in WNIDS}
    labels = rng.permutation(np.repeat(WNIDS, VALIDATION))
    found |= {f"val/images/val_{i}.JPEG": jpeg(i) for i in range(len(labels))}
    lines = (f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(labels))
    # After the images it speaks of, as in the archives.
    found["val/val_annotations.txt"] = "".join(lines).encode()
    found |= {"wnids.txt": "\n".join(WNIDS).encode(), "test/images/test_0.JPEG": jpeg(0)}
    return {f"tiny-imagenet-200/{path}": content for path, content in found.items()}


def unpacked(files: dict[str, bytes], directory: Path) -> Path:
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return directory / "tiny-imagenet-200"


def archive(files: dict[str, bytes], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def parts(files: dict[str, bytes], directory: Path) -> Path:
    """Two archives, the second with one class and the validation images, beside other data."""
    second = {path: c for path, c in files.items() if WNIDS[2] in path or "/train/" not in path}
    archive(second, directory / "tiny.part2.tar.xz")
    archive({p: c for p, c in files.items() if p not in second}, directory / "tiny.part1.tar.xz")
    archive({"other/train/cat/0.jpg": b""}, directory / "other.tar.xz")
    return directory


@pytest.mark.parametrize("form", ["directory", "archive", "parts"])
def test_what_is_loaded_are_the_files(files, tmp_path, form):
    source = {
        "directory": lambda: unpacked(files, tmp_path / "source"),
        "archive": lambda: archive(files, tmp_path / "tiny.tar.xz"),
        "parts": lambda: parts(files, tmp_path / "source"),
    }[form]()
    prepare_tiny_imagenet(source, tmp_path / "data")
    data = load("tiny_imagenet", data_dir=tmp_path / "data", validation=3)
    assert data.class_names == WNIDS
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 6)
    assert data.image_shape == (64, 64, 3)

    def rows(*parts):
        return sorted(
            (WNIDS[label], image.tobytes())
            for part in parts
            for image, label in zip(part.images, part.labels, strict=True)
        )

    def expected(prefix, wnid_of):
        return sorted(
            (wnid_of(path), decode(content, path).tobytes())
            for path, content in files.items()
            if path.startswith(f"tiny-imagenet-200/{prefix}") and path.endswith("JPEG")
        )

    lines = files["tiny-imagenet-200/val/val_annotations.txt"].decode().splitlines()
    annotations = {line.split()[0]: line.split()[1] for line in lines}
    assert rows(data.train, data.validation) == expected("train", lambda path: path.split("/")[2])
    assert rows(data.test) == expected("val/images", lambda path: annotations[Path(path).name])


def test_the_first_classes_are_kept(files, tmp_path):
    prepare_tiny_imagenet(unpacked(files, tmp_path / "source"), tmp_path / "data")
    whole = load("tiny_imagenet", data_dir=tmp_path / "data", validation=0, image_size=8)
    first = load("tiny_imagenet", data_dir=tmp_path / "data", validation=0, image_size=8, classes=2)
    assert first.class_names == WNIDS[:2]
    for part in ("train", "test"):
        kept = whole.parts[part][whole.parts[part].labels < 2]
        np.testing.assert_array_equal(first.parts[part].images, kept.images)
        np.testing.assert_array_equal(first.parts[part].labels, kept.labels)
    for classes in (0, 4):
        with pytest.raises(ValueError, match=rf"classes={classes} must be 1 to 3"):
            load("tiny_imagenet", data_dir=tmp_path / "data", classes=classes)


@pytest.mark.parametrize("form", ["directory", "archive"])
def test_classes_are_called_by_their_words_where_there_are_some(files, tmp_path, form):
    # Of more classes than there are, as in the archives, and here of not all of them.
    words = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02814860\tbeacon\n"
    files["tiny-imagenet-200/words.txt"] = words.encode()
    if form == "directory":
        source = unpacked(files, tmp_path / "source")
    else:
        source = archive(files, tmp_path / "tiny.tar.xz")
    prepare_tiny_imagenet(source, tmp_path / "data")
    names = ["goldfish, Carassius auratus", "n01629819", "beacon"]
    for classes in (None, 2):
        told = facts(load("tiny_imagenet", data_dir=tmp_path / "data", classes=classes))
        assert told["class_names"] == names[:classes]
    stream = load_stream("tiny_imagenet", image_size=8, data_dir=tmp_path / "data")
    assert facts(stream)["class_names"] == names


def without(files: dict[str, bytes], word: str) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if word not in path}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: without(f, WNIDS[1]), "train has 2 classes, not 3. Is one of its parts"),
        (lambda f: without(f, f"{WNIDS[1]}_2."), f"train has 3 images of {WNIDS[1]}, not 4"),
        (lambda f: without(f, "annotations"), "has no val/val_annotations.txt"),
        (
            lambda f: {**f, "tiny-imagenet-200/val/images/val_99.JPEG": b""},
            "val_annotations.txt has no line for val_99.JPEG",
        ),
        (
            lambda f: {p: c[:300] if p.endswith(f"{WNIDS[0]}_1.JPEG") else c for p, c in f.items()},
            f"train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG in .* is not a readable PNG or JPEG",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(files, tmp_path, change, words):
    source = unpacked(change(files), tmp_path / "source")
    with pytest.raises(ValueError, match=words):
        prepare_tiny_imagenet(source, tmp_path / "data")


def test_what_does_not_belong_is_left_out(files, tmp_path):
    """Hidden files and archives, as macOS adds them; links where they lead to images."""
    noise = {
        f"__MACOSX/tiny-imagenet-200/train/{WNIDS[0]}/images/._{WNIDS[0]}_0.JPEG": b"x",
        f"tiny-imagenet-200/train/{WNIDS[0]}/images/._{WNIDS[0]}_0.JPEG": b"x",
        f"tiny-imagenet-200/train/{WNIDS[0]}/.ipynb_checkpoints/images/0.JPEG": b"x",
        "tiny-imagenet-200/.git/val_annotations.txt": b"\xff",
    }
    noise |= files
    source = parts(noise, tmp_path / "source")
    (source / "._tiny.part1.tar.xz").write_bytes(b"x")
    prepare_tiny_imagenet(source, tmp_path / "data")
    (source / "tiny.part2.tar.xz").unlink()
    unpacked(noise, tmp_path / "b")
    image = tmp_path / f"b/tiny-imagenet-200/train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"
    image.rename(tmp_path / "b/moved")
    image.symlink_to("../../../../moved")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "b", ".")
    prepare_tiny_imagenet(tmp_path / "b.tar", tmp_path / "data_b")
    loaded = [
        load("tiny_imagenet", data_dir=tmp_path / data, validation=0) for data in ("data", "data_b")
    ]
    for part in ("train", "test"):
        np.testing.assert_array_equal(*(data.parts[part].images for data in loaded))
        np.testing.assert_array_equal(*(data.parts[part].labels for data in loaded))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("val/val_annotations.txt", b"val_0.JPEG\n", "names no class for val_0.JPEG"),
        ("val/val_annotations.txt", b"val_0.JPEG\tcl\xe9\n", "val_annotations.txt is no UTF-8"),
        ("words.txt", b"n01443537\tpoup\xe9e\n", "words.txt is no UTF-8"),
        ("words.txt", "n01443537\tpoup\u202eee\n".encode(), r"the class name 'poup\\u202eee'"),
    ],
)
def test_texts_that_cannot_be_read_are_named(files, tmp_path, name, content, words):
    files[f"tiny-imagenet-200/{name}"] = content
    with pytest.raises(ValueError, match=words):
        prepare_tiny_imagenet(unpacked(files, tmp_path / "source"), tmp_path / "data")
