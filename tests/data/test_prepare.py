"""From a folder of images to a data set: preparing, then loading."""

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ab_jax.data import load
from ab_jax.data.prepare import main, prepare_cifar10_jpeg, prepare_image_folder
from ab_jax.data.prepared import find_prepared

ROOT = Path(__file__).parents[2]
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
CIFAR10 = ("airplane", "automobile", *ANIMALS, "ship", "truck")


def as_rows(images):
    """Images with their labels, in an order that does not depend on theirs."""
    return sorted(
        (int(label), image.tobytes())
        for image, label in zip(images.images, images.labels, strict=True)
    )


def expected_rows(pixels, split, classes=("ant", "bee")):
    return sorted(
        (classes.index(name.split("/")[1]), image.tobytes())
        for name, image in pixels.items()
        if name.startswith(split)
    )


def joined(*parts):
    return sorted(row for part in parts for row in as_rows(part))


def test_what_is_loaded_is_what_was_prepared(image_folder, tmp_path):
    source, pixels = image_folder({"train": 20, "test": 6}, size=4)
    directory = prepare_image_folder(source, "bugs", tmp_path / "data")
    assert directory == tmp_path / "data/image_folder/bugs/1.0.0"
    data = load("image_folder:bugs", data_dir=tmp_path / "data", validation=10)
    assert (data.name, data.version, data.class_names) == (
        "image_folder:bugs",
        "1.0.0",
        ("ant", "bee"),
    )
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 12)
    assert data.image_shape == (4, 4, 3)
    assert as_rows(data.test) == expected_rows(pixels, "test")
    assert joined(data.train, data.validation) == expected_rows(pixels, "train")
    np.testing.assert_allclose(data.mean, (data.train.images / 255).mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(data.std, (data.train.images / 255).std((0, 1, 2)), rtol=1e-9)


def test_loading_again_gives_the_same(image_folder, tmp_path):
    """From the records, from the decoded copy beside them, and from another directory."""
    source, _ = image_folder({"train": 12, "test": 2}, size=4)
    loaded = []
    for data_dir in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        prepare_image_folder(source, "bugs", data_dir)
        loaded.append(load("image_folder:bugs", data_dir=data_dir, validation=4))
    assert list((tmp_path / "a").rglob("decoded-train-full.npz"))
    for other in loaded[1:]:
        for part, images in loaded[0].parts.items():
            np.testing.assert_array_equal(other.parts[part].images, images.images)
            np.testing.assert_array_equal(other.parts[part].labels, images.labels)


def test_the_order_mixes_the_classes(image_folder, tmp_path):
    source, _ = image_folder({"train": 150, "test": 1}, size=2)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    data = load("image_folder:bugs", data_dir=tmp_path / "data", validation=100)
    # Hypergeometric, 50 bees in 100 expected, deviation 4.1. Names fix the order: no luck in it.
    assert 35 < data.validation.labels.sum() < 65


def test_a_tenth_is_the_validation_part_by_default(image_folder, tmp_path):
    source, _ = image_folder({"train": 10, "test": 1}, size=2)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    assert len(load("image_folder:bugs", data_dir=tmp_path / "data").validation) == 2


def test_a_validation_split_is_the_validation_part(image_folder, tmp_path):
    source, pixels = image_folder({"train": 4, "val": 3, "test": 2}, size=2)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    data = load("image_folder:bugs", data_dir=tmp_path / "data")
    assert as_rows(data.train) == expected_rows(pixels, "train")
    assert as_rows(data.validation) == expected_rows(pixels, "val")
    assert as_rows(data.test) == expected_rows(pixels, "test")
    with pytest.raises(ValueError, match="split of its own: leave out validation=3"):
        load("image_folder:bugs", data_dir=tmp_path / "data", validation=3)


def test_without_a_test_split_the_validation_split_is_the_test_part(image_folder, tmp_path):
    source, pixels = image_folder({"train": 4, "val": 3}, size=2)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    data = load("image_folder:bugs", data_dir=tmp_path / "data", validation=2)
    assert as_rows(data.test) == expected_rows(pixels, "val")
    assert joined(data.train, data.validation) == expected_rows(pixels, "train")


@pytest.mark.parametrize("validation", [-1, 8])
def test_a_validation_part_that_does_not_fit_is_refused(image_folder, tmp_path, validation):
    source, _ = image_folder({"train": 4, "test": 1}, size=2)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    with pytest.raises(ValueError, match=f"validation={validation} must .* the 8 training images"):
        load("image_folder:bugs", data_dir=tmp_path / "data", validation=validation)


def test_image_size_makes_sizes_equal(image_folder, tmp_path, rng):
    source, _ = image_folder({"train": 3, "test": 2}, size=8)
    big = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(big).save(source / "test/ant/big.png")
    prepare_image_folder(source, "bugs", tmp_path / "data")
    with pytest.raises(ValueError, match=r"test/\w+/\w+.png has \d+ x \d+ pixels and test/\w+"):
        load("image_folder:bugs", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match=r"image_size=5 must divide .* \w+/\w+/\w+.png has"):
        load("image_folder:bugs", data_dir=tmp_path / "data", image_size=5)
    data = load("image_folder:bugs", data_dir=tmp_path / "data", image_size=4)
    means = big.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
    distance = np.abs(data.test.images.astype(float) - means).max(axis=(1, 2, 3))
    assert (distance <= 0.5).sum() == 1


def test_loading_does_not_import_tensorflow(image_folder, tmp_path):
    source, _ = image_folder({"train": 4, "test": 1}, size=2)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    script = f"""
import sys
import ab_jax.data
assert not {{"tensorflow", "tensorflow_datasets", "sklearn"}} & set(sys.modules), "too early"
data = ab_jax.data.load("image_folder:bugs", data_dir={str(tmp_path / "data")!r}, validation=1)
assert len(data.train) == 7
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd=ROOT)


def test_preparing_does_not_import_tensorflow(image_folder, tmp_path):
    source, _ = image_folder({"train": 2, "test": 1}, size=2)
    script = f"""
import sys
from ab_jax.data.prepare import main
main(["image_folder", "--source={source}", "--name=bugs", "--data_dir={tmp_path / "data"}"])
assert "tensorflow" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "train: 4 images" in run.stdout
    assert f"ready: {tmp_path}/data/image_folder/bugs/1.0.0" in run.stdout


def test_the_official_cifar10_is_read_as_its_builder_stores_it(tmp_path, rng):
    """A copy of that builder's features, 20 + 10 images; the real one needs TensorFlow to write."""
    counts = {"train": 20, "test": 10}
    pixels = {
        f"{split}_{i:05d}": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for split, count in counts.items()
        for i in range(count)
    }

    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.2")
        code_path = None

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=CIFAR10),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in counts}

        def _generate_examples(self, split):
            for i in range(counts[split]):
                buffer = io.BytesIO()
                Image.fromarray(pixels[f"{split}_{i:05d}"]).save(buffer, format="PNG")
                example = {"image": buffer.getvalue(), "label": i % 10}
                yield i, example | {"id": f"{split}_{i:05d}"}

    Cifar10(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    data = load("cifar10", data_dir=tmp_path, validation=5)
    assert (data.version, data.class_names) == ("3.0.2", CIFAR10)
    for split, loaded in (
        ("train", joined(data.train, data.validation)),
        ("test", as_rows(data.test)),
    ):
        assert loaded == sorted(
            (i % 10, pixels[f"{split}_{i:05d}"].tobytes()) for i in range(counts[split])
        )


# Errors of the command line


def test_preparing_twice_says_so_and_changes_nothing(image_folder, tmp_path, capsys):
    source, _ = image_folder({"train": 2, "test": 1}, size=2)
    command = [
        "image_folder",
        f"--source={source}",
        "--name=bugs",
        f"--data_dir={tmp_path / 'data'}",
    ]
    main(command)
    assert "already prepared" not in capsys.readouterr().out
    directory = find_prepared("image_folder:bugs", tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    main(command)
    assert f"image_folder:bugs is already prepared in {directory}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["cifar10_jpeg", "--source=none.tar.xz"], "error: no such file or directory: none.tar.xz"),
        (["image_folder", "--source=.", "--name=a/b"], "error: --name=a/b must be a letter"),
    ],
)
def test_bad_arguments_are_named_before_any_work(command, message, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([*command, f"--data_dir={tmp_path / 'data'}"])
    assert not (tmp_path / "data").exists()


def test_a_damaged_image_ends_preparing_and_leaves_nothing(image_folder, tmp_path):
    source, _ = image_folder({"train": 2, "test": 1})
    (source / "train/ant/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/ant/0.png in .* is not a readable PNG or JPEG"):
        prepare_image_folder(source, "bugs", tmp_path / "data")
    assert find_prepared("image_folder:bugs", tmp_path / "data") is None
    assert not list((tmp_path / "data").rglob("*.array_record*"))


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_said_in_a_line_and_nothing_is_left(
    image_folder, tmp_path, full_disk, there
):
    """Neither files nor directories, but for those that were there before."""
    source, _ = image_folder({"train": 20, "test": 2}, size=32)
    data_dir = tmp_path / "data"
    if there:
        (data_dir / "downloads").mkdir(parents=True)
    command = ["image_folder", f"--source={source}", "--name=bugs", f"--data_dir={data_dir}"]
    with full_disk(3000), pytest.raises(SystemExit) as exit_:
        main(command)
    message = str(exit_.value.code)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"error: {data_dir / 'image_folder/bugs'} cannot be written: File to")
    assert "then give the same command again" in message
    left = set(data_dir.parent.rglob("data*")) | set(data_dir.rglob("*"))
    assert left == ({data_dir, data_dir / "downloads"} if there else set())
    main(command)
    assert find_prepared("image_folder:bugs", data_dir) is not None


def test_files_left_out_are_mentioned(image_folder, tmp_path, capsys):
    source, _ = image_folder({"train": 2, "test": 1})
    (source / "train/ant/boxes.txt").touch()
    prepare_image_folder(source, "bugs", tmp_path / "data")
    assert "1 files of" in (out := capsys.readouterr().out)
    assert "such as train/ant/boxes.txt" in out


def test_the_official_cifar10_names_the_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"error: .*`pip install tensorflow`"):
        main(["cifar10", f"--data_dir={tmp_path}"])


# CIFAR-10 as JPEG


def test_another_archive_is_not_taken_for_cifar10(image_folder, tmp_path):
    source, _ = image_folder({"train": 2, "test": 1})
    message = "is not the JPEG copy of CIFAR-10.*found test: 1 ant, 1 bee; train: 2 ant, 2 bee"
    with pytest.raises(ValueError, match=message):
        prepare_cifar10_jpeg(source, tmp_path / "data")


@pytest.fixture(scope="session")
def cifar10_jpeg_data_dir(cifar10_jpeg_archive, tmp_path_factory):
    """The whole archive, prepared once: 20 seconds."""
    data_dir = tmp_path_factory.mktemp("cifar10_jpeg")
    prepare_cifar10_jpeg(cifar10_jpeg_archive, data_dir)
    return data_dir


@pytest.mark.long
def test_cifar10_jpeg_is_the_archive(cifar10_jpeg_archive, cifar10_jpeg_data_dir):
    data = load("cifar10_jpeg", data_dir=cifar10_jpeg_data_dir)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.class_names == CIFAR10
    assert data.image_shape == (32, 32, 3)
    counts = np.bincount(data.train.labels) + np.bincount(data.validation.labels)
    np.testing.assert_array_equal(counts, [5000] * 10)
    np.testing.assert_array_equal(np.bincount(data.test.labels), [1000] * 10)
    # Hypergeometric with mean 500 and deviation 20; the order is fixed, so this is no test of luck.
    np.testing.assert_allclose(np.bincount(data.validation.labels), 500, atol=60)

    # The first test images of the archive, decoded by Pillow directly, are there with their label.
    rows = set(as_rows(data.test))
    with tarfile.open(cifar10_jpeg_archive, "r|*") as archive:
        for _, member in zip(range(50), (m for m in archive if m.isfile()), strict=False):
            split, class_name, _ = member.name.split("/")
            pixels = np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())))
            assert split == "test"
            assert (CIFAR10.index(class_name), pixels.tobytes()) in rows


def test_records_in_another_format_are_refused(image_folder, tmp_path):
    source, _ = image_folder({"train": 2, "test": 1})
    directory = prepare_image_folder(source, "bugs", tmp_path / "data")
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    message = "prepared as tfrecord, which cannot be read without TensorFlow.*--name=bugs"
    with pytest.raises(ValueError, match=message):
        load("image_folder:bugs", data_dir=tmp_path / "data")
