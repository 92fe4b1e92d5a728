"""Images that cannot be read: all are named at once, or left out and written down."""

import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from ab_jax.data import load
from ab_jax.data.prepare import main, prepare_image_folder, prepare_tiny_imagenet
from ab_jax.data.prepared import find_prepared
from ab_jax.data.stream import load_stream


@pytest.fixture
def damaged(image_folder, rng):
    """A folder of 2 x 20 training and 2 x 2 test images, 25 of them damaged: their names and it."""
    source, pixels = image_folder({"train": 20, "test": 2}, size=4)
    bad = [str(name) for name in rng.choice([n for n in pixels if "train" in n], 25, replace=False)]
    # A class must keep an image.
    bad = [name for name in bad if not name.endswith("/0.png")]
    for name in bad:
        (source / name).write_bytes((source / name).read_bytes()[: int(rng.integers(40))])
    return source, bad, {name: image for name, image in pixels.items() if name not in bad}


def test_all_are_named_in_one_error(damaged, tmp_path):
    source, bad, _ = damaged
    with pytest.raises(ValueError, match=f"{len(bad)} images cannot be read.*--skip_bad") as error:
        prepare_image_folder(source, "bugs", tmp_path / "data")
    named = re.findall(r"train/\w+/\d+\.png", str(error.value))
    assert len(named) == min(20, len(bad)) == len(set(named))
    assert set(named) <= set(bad)
    assert (f"and {len(bad) - 20} more" in str(error.value)) == (len(bad) > 20)
    assert "object at" not in str(error.value)
    assert find_prepared("image_folder:bugs", tmp_path / "data") is None


def test_they_are_left_out_and_written_down(damaged, tmp_path, capsys):
    source, bad, whole = damaged
    data_dir = tmp_path / "data"
    options = [f"--source={source}", "--name=bugs", f"--data_dir={data_dir}", "--skip_bad"]
    main(["image_folder", *options])
    said = capsys.readouterr().out
    assert f"{len(bad)} images of {source} cannot be read and are left out" in said
    assert f"train: {40 - len(bad)} images" in said
    directory = find_prepared("image_folder:bugs", data_dir)
    left_out = json.loads((directory / "metadata.json").read_text())["left_out"]
    assert sorted(left_out) == sorted(bad)
    assert all(name in why for name, why in left_out.items())
    data = load("image_folder:bugs", data_dir=data_dir, validation=0)
    for part in ("train", "test"):
        images = data.parts[part].images
        expected = {image.tobytes() for name, image in whole.items() if name.startswith(part)}
        assert {image.tobytes() for image in images} == expected


def test_skipping_changes_nothing_where_all_can_be_read(image_folder, tmp_path):
    source, _ = image_folder({"train": 3, "test": 1}, size=4)
    made = [
        prepare_image_folder(source, "bugs", tmp_path / str(skip), skip_bad=skip)
        for skip in (False, True)
    ]
    for name in ("metadata.json", "label.labels.txt", "dataset_info.json"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


def test_a_class_without_a_readable_image_is_named(image_folder, tmp_path):
    source, _ = image_folder({"train": 1, "test": 1})
    (source / "train/bee/0.png").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"same classes, but bee.*; 1 images cannot be read, such as train/bee/0.png",
    ):
        prepare_image_folder(source, "bugs", tmp_path / "data", skip_bad=True)


def test_a_damaged_archive_is_no_bad_image(image_folder, tmp_path):
    source, _ = image_folder({"train": 3, "test": 1})
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as packed:
        packed.add(source, "source")
    archive.write_bytes(archive.read_bytes()[: 512 * 7])
    with pytest.raises(ValueError, match="damaged archive"):
        prepare_image_folder(archive, "bugs", tmp_path / "data", skip_bad=True)


def test_a_data_set_of_fixed_images_lists_them_and_offers_no_skipping(tmp_path):
    for split, name in (("train/n1/images", "a"), ("train/n1/images", "b"), ("val/images", "c")):
        path = tmp_path / "tiny" / split / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    (tmp_path / "tiny/val/val_annotations.txt").write_text("c.JPEG\tn1\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match="3 images cannot be read") as error:
        prepare_tiny_imagenet(tmp_path / "tiny", tmp_path / "data")
    for name in ("n1/a.JPEG", "n1/b.JPEG", "n1/c.JPEG"):
        assert name in str(error.value)
    assert "skip_bad" not in str(error.value)


def test_images_of_many_sizes_are_streamed(image_folder, tmp_path, rng):
    """As the error over images in memory says; of a folder without validation images too."""
    source, _ = image_folder({"train": 3, "test": 2}, size=8)
    wide = rng.integers(0, 256, (8, 20, 3), dtype=np.uint8)
    for split in ("train", "test"):
        Image.fromarray(wide).save(source / split / "ant/wide.png")
    prepare_image_folder(source, "bugs", tmp_path / "data")
    with pytest.raises(ValueError, match=r"must have one size .* --stream"):
        load("image_folder:bugs", data_dir=tmp_path / "data")
    data = load_stream("image_folder:bugs", image_size=8, data_dir=tmp_path / "data", validation=2)
    assert (len(data.train), len(data.validation), len(data.test)) == (5, 2, 5)
    assert [len(batch) for batch in data.train.train_batches(0, 5, 0, 2)] == [5, 5]
    sizes = [image.shape for image, _ in data.test.read(range(5))]
    assert sorted(sizes) == [(8, 8, 3)] * 4 + [(8, 20, 3)]
