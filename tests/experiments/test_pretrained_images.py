"""The images that networks of ImageNet are calibrated with and read on: which, and their pixels."""

import io
import re
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ab_jax.data import tiny_imagenet
from ab_jax.data.prepare import prepare_tiny_imagenet
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.pretrained import load_pretrained
from experiments.pretrained.imagenet_classes import class_ids, class_index, class_names
from experiments.pretrained.images import ImageSet, drawn, half_of_each, resized
from experiments.pretrained.photographs import Photographs
from experiments.pretrained.tiny_photographs import TinyPhotographs

# The classes


def test_the_classes_are_a_thousand_wordnet_ids_in_order():
    ids = class_ids()
    assert len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in ids)
    assert [ids[0], ids[1], ids[999]] == ["n01440764", "n01443537", "n15075141"]  # tench, goldfish
    assert [class_index(wnid) for wnid in ids] == list(range(1000))


def test_each_class_has_a_name_of_its_own():
    names = class_names()
    assert len(set(names)) == len(names) == 1000
    assert [names[i] for i in (0, 1, 207, 281, 954, 999)] == [
        *("tench", "goldfish", "golden retriever", "tabby", "banana", "toilet tissue")
    ]
    assert all(name and name == name.strip() for name in names)


@pytest.mark.parametrize(
    ("name", "index"),
    [("0", 0), ("0007", 7), ("999", 999), ("1000", None), ("-1", None), ("", None), ("²", None)],
)
def test_a_class_may_be_named_by_its_index(name, index):
    assert class_index(name) == index


# Draws and sizes


def test_a_draw_takes_every_class_before_it_takes_one_again(rng):
    labels = rng.permutation(np.repeat(np.arange(7), 9))
    chosen = drawn(labels, None, 3)
    assert sorted(chosen) == list(range(63))
    for count in (1, 7, 20, 63):
        np.testing.assert_array_equal(drawn(labels, count, 3), chosen[:count])
        found = Counter(labels[chosen[:count]].tolist())
        assert sorted(found.values())[-1] - min(found.get(c, 0) for c in range(7)) <= 1
    assert set(drawn(labels, 20, 4)) != set(chosen[:20])


def test_draws_are_the_same_for_good():
    """A record says no more of its images than the seed."""
    assert drawn(np.arange(10) % 3, None, 0).tolist() == [6, 4, 2, 1, 5, 0, 7, 8, 9, 3]


@pytest.mark.parametrize("count", [0, 11])
def test_a_draw_of_more_than_there_are_is_refused(count):
    with pytest.raises(ValueError, match=rf"{count} images.*10 to draw from"):
        drawn(np.zeros(10, int), count, 0)


def test_enlarging_interpolates_between_the_centers_of_pixels(rng):
    images = rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))  # [to, from]
    expected = np.einsum("yi,xj,nijc->nyxc", weights, weights, images)
    found = resized(images, 28)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, expected, atol=1)
    assert resized(images, 8) is images


def test_batches_are_what_all_at_once_are(rng):
    images = rng.integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)
    some = ImageSet(images, 6, np.arange(7, dtype=np.int32), np.arange(9, dtype=np.int32))
    batches = list(some.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), some.pixels())
    part = some[np.asarray([5, 2])]
    assert (part.labels.tolist(), len(part), part.classes.tolist()) == ([5, 2], 2, list(range(9)))
    np.testing.assert_array_equal(part.pixels(), some.pixels()[[5, 2]])


def test_half_of_each_takes_turns(rng):
    def some(side, first):
        images = rng.integers(0, 256, (3, side, side, 3)).astype(np.uint8)
        return ImageSet(images, 8, np.arange(first, first + 3, dtype=np.int32))

    first, second = some(8, 0), some(4, 10)
    both = half_of_each(first, second)
    np.testing.assert_array_equal(both.images[::2], first.images)
    np.testing.assert_array_equal(both.images[1::2], second.pixels())
    assert both.labels.tolist() == [0, 10, 1, 11, 2, 12]
    assert half_of_each(first, ImageSet(second.images, 8)).labels is None
    with pytest.raises(ValueError, match=r"not 3 of 8 and 2 of 8 pixels"):
        half_of_each(first, second[:2])


# Photographs


@pytest.fixture
def colours(rng):
    """Colours to tell photographs by, by their paths, and what writes such photographs."""

    def write(folder: Path, *paths: str) -> dict[str, tuple[int, ...]]:
        found = {}
        for path in paths:
            found[path] = tuple(rng.integers(0, 256, 3).tolist())
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), found[path]).save(folder / path, "PNG")
        return found

    return write


def seen(images: ImageSet) -> list[tuple[int, ...]]:
    assert images.images.dtype == np.uint8
    assert images.images.shape[1:] == (16, 16, 3)
    return [tuple(image[3, 3].tolist()) for image in images.pixels()]


NUMBERED = [f"{number:04d}_{class_ids()[number]}.jpg" for number in (0, 1, 2, 3, 5, 998, 999)]


@pytest.mark.parametrize("form", ["directory", "archive"])
def test_numbered_photographs_of_even_number_calibrate_and_of_odd_are_read(colours, tmp_path, form):
    found = colours(tmp_path / "photos", *NUMBERED)
    (tmp_path / "photos/README.txt").write_text("no photograph")
    (tmp_path / "photos/.hidden.jpg").write_text("no photograph")
    source = tmp_path / "photos"
    if form == "archive":
        source = tmp_path / "photos.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(tmp_path / "photos", "photos")
    photographs = Photographs(source, 16)
    test, calibration = photographs.test(), photographs.calibration()
    assert test.labels.tolist() == [1, 3, 5, 999]
    assert seen(test) == [found[NUMBERED[i]] for i in (1, 3, 4, 6)]
    assert sorted(calibration.labels.tolist()) == [0, 2, 998]
    by_label = dict(zip(calibration.labels.tolist(), seen(calibration), strict=True))
    assert by_label == {0: found[NUMBERED[0]], 2: found[NUMBERED[2]], 998: found[NUMBERED[5]]}
    assert test.labels.dtype == calibration.labels.dtype == np.int32
    two = photographs.calibration(2)
    assert seen(two) == seen(calibration)[:2]
    with pytest.raises(ValueError, match=r"photos.*4 images are asked for.*3 to draw from"):
        photographs.calibration(4)


@pytest.mark.parametrize("names", [("n01443537", "n15075141"), ("1", "999")])
def test_each_class_of_a_folder_is_halved(colours, tmp_path, names):
    paths = [f"{name}/{file}" for name in names for file in ("a.png", "b.PNG", "c.png")]
    found = colours(tmp_path / "deeper", *paths, f"{names[1]}/d.png")
    photographs = Photographs(tmp_path, 16)
    test, calibration = photographs.test(), photographs.calibration()
    assert test.labels.tolist() == [1, 999, 999]
    first, second = names
    assert seen(test) == [
        found[f"{first}/b.PNG"],
        found[f"{second}/b.PNG"],
        found[f"{second}/d.png"],
    ]
    assert sorted(calibration.labels[:2].tolist()) == [1, 999]
    assert sorted(seen(calibration)) == sorted(
        found[f"{name}/{file}"] for name in names for file in ("a.png", "c.png")
    )


def test_a_folder_without_classes_calibrates_alone(colours, tmp_path):
    found = colours(tmp_path, "pictures/x.png", "pictures/y.png", "pictures/z.png")
    calibration = Photographs(tmp_path, 16).calibration()
    assert calibration.labels is None
    assert sorted(seen(calibration)) == sorted(found.values())
    with pytest.raises(ValueError, match=r"no images to read an accuracy on.*CLASS/FILE"):
        Photographs(tmp_path, 16).test()


def test_of_a_photograph_the_middle_is_seen(tmp_path):
    pixels = np.zeros((256, 300, 3), np.uint8)
    pixels[16:240, 38:262] = np.arange(224, dtype=np.uint8)[:, None]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    (image,) = Photographs(tmp_path).calibration().pixels()
    np.testing.assert_array_equal(image, pixels[16:240, 38:262])


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["0000_n01443537.jpg"], "0000_n01443537.jpg: n01443537 is not class 0"),
        (["n01440764/a.png", "cats/b.png"], "directory of cats/b.png is none of ImageNet's 1,000"),
        (["n01440764/a.png", "b.png"], "directory of b.png is none"),
        (["1000/a.png", "1/a.png"], "directory of 1000/a.png is none"),
        ([], "has no images"),
    ],
)
def test_other_folders_are_told_what_is_wanted(colours, tmp_path, paths, words):
    colours(tmp_path, *paths)
    with pytest.raises(ValueError, match=words) as error:
        Photographs(tmp_path).calibration()
    assert "not passed on" in str(error.value)


def test_where_nothing_is_it_is_said_where_photographs_come_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--photographs=.*/none.*folder of your own"):
        Photographs(tmp_path / "none").test()


def test_a_damaged_photograph_is_named(colours, tmp_path):
    colours(tmp_path, "x.png")
    (tmp_path / "y.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"y\.jpg in .* is not a readable"):
        Photographs(tmp_path).calibration()


# Tiny ImageNet


WNIDS = ("n15075141", "n01443537", "n02814860")


@pytest.fixture
def tiny(rng, tmp_path, monkeypatch):
    """One of three classes with 5 training images each and 2 to read, of 64 pixels."""
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 3)
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": 5, "validation": 2})

    def jpeg():
        buffer = io.BytesIO()
        noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG")
        return buffer.getvalue()

    source = tmp_path / "tiny-imagenet-200"
    files = {f"train/{w}/images/{w}_{i}.JPEG": jpeg() for w in WNIDS for i in range(5)}
    files |= {f"val/images/val_{i}.JPEG": jpeg() for i in range(6)}
    lines = (f"val_{i}.JPEG\t{WNIDS[i % 3]}\n" for i in range(6))
    files["val/val_annotations.txt"] = "".join(lines).encode()
    # As in the real one, so that classes are not called by their ids.
    files["words.txt"] = b"n15075141\ttoilet tissue\nn01443537\tgoldfish\n"
    for path, content in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(content)
    prepare_tiny_imagenet(source, tmp_path / "data")
    labels = {}
    for path, content in files.items():
        if path.endswith("JPEG"):
            annotated = WNIDS[int(re.findall(r"\d+", path)[-1]) % 3]
            wnid = path.split("/")[1] if path.startswith("train") else annotated
            pixels = np.asarray(Image.open(io.BytesIO(content)))
            labels[pixels.tobytes()] = class_ids().index(wnid)
    return TinyPhotographs(224, tmp_path / "data"), labels


def test_tiny_imagenets_parts_are_others_and_have_the_labels_of_imagenet(tiny):
    images, labels = tiny
    classes = sorted(class_ids().index(wnid) for wnid in WNIDS)
    parts = images.calibration(None), images.choice(), images.test()
    keys = [[image.tobytes() for image in part.images] for part in parts]
    assert [len(found) for found in keys] == [9, 6, 6]
    assert sorted(key for found in keys for key in found) == sorted(labels)
    for part, found in zip(parts, keys, strict=True):
        assert part.labels.tolist() == [labels[key] for key in found]
        assert part.classes.tolist() == classes
        assert (part.labels.dtype, part.classes.dtype) == (np.int32, np.int32)
        assert Counter(part.labels.tolist()) == dict.fromkeys(classes, len(found) // 3)
        assert part.images.shape[1:] == (64, 64, 3)  # enlarged no sooner than they are needed
        assert part.pixels().shape[1:] == (224, 224, 3)


def test_draws_of_tiny_imagenet_leave_out_the_images_to_choose_on(tiny):
    images, _ = tiny
    choice = {image.tobytes() for image in images.choice().images}
    draws = [{i.tobytes() for i in images.calibration(6, draw=d).images} for d in range(6)]
    assert all(len(found) == 6 and not found & choice for found in draws)
    assert any(found != draws[0] for found in draws)
    with pytest.raises(ValueError, match=r"10 images are asked for, and there are 9"):
        images.calibration(10)


def test_tiny_imagenets_training_images_are_not_decoded_to_read_the_others(tiny, tmp_path):
    images, _ = tiny
    images.test()
    (kept,) = tmp_path.glob("data/tiny_imagenet/*/decoded-*")
    assert kept.name == "decoded-validation-full.npz"


def test_tiny_imagenet_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ab_jax\.data\.prepare tiny_imagenet"):
        TinyPhotographs(data_dir=tmp_path).test()


# The real ones


def test_mobilenet_names_as_many_photographs_as_it_is_known_to(pretrained_files):
    """Another crop, resizing or normalization would cost more than what is left open here."""
    photographs = Photographs(pretrained_files / "imagenet_photos_256.tar")
    parts = photographs.calibration(), photographs.test()
    assert [len(part) for part in parts] == [500, 500]
    model = MobileNet(width=0.25)
    shapes = jax.eval_shape(
        partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 224, 224, 3))
    )
    variables = load_pretrained(pretrained_files / "mobilenet_v1_025_224.safetensors", shapes)
    logits = jax.jit(lambda images: model.apply(variables, images / 127.5 - 1.0, train=False))
    named = [
        np.asarray(logits(batch.astype(np.float32))).argmax(-1) == labels
        for part in parts
        for batch, labels in zip(part.batches(50), part.labels.reshape(-1, 50), strict=True)
    ]
    assert 100 * np.mean(named) == pytest.approx(58.0, abs=0.3)
