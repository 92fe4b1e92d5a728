import numpy as np
import pytest
from sklearn.datasets import load_digits

from ab_jax.data import load
from ab_jax.data.prepared import find_prepared


def test_digits_are_scikit_learns():
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1197, 200, 400)
    assert data.image_shape == (8, 8, 1)
    assert data.class_names == tuple("0123456789")
    # Every image of the original once, with its label: 255/16 apart, so that rounding loses none.
    bunch = load_digits()
    original = sorted(
        (int(label), image.astype(int).tolist())
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    loaded = sorted(
        (int(label), np.round(image[..., 0] / 255 * 16).astype(int).tolist())
        for part in data.parts.values()
        for image, label in zip(part.images, part.labels, strict=True)
    )
    assert loaded == original
    assert max(part.images.max() for part in data.parts.values()) == 255


def test_digits_parts_hold_about_equal_shares_of_every_class():
    data = load("digits")
    for part in (data.validation, data.test):
        share = np.bincount(part.labels, minlength=10) / len(part)
        # Three deviations of 200 draws are 0.064; the order is fixed, so this is no test of luck.
        np.testing.assert_allclose(share, 0.1, atol=0.064)


def test_the_validation_part_is_the_end_of_the_training_part():
    whole, cut = load("digits", validation=0), load("digits", validation=300)
    assert (len(whole.validation), len(cut.validation)) == (0, 300)
    both = np.concatenate([cut.train.images, cut.validation.images])
    np.testing.assert_array_equal(both, whole.train.images)
    np.testing.assert_array_equal(cut.test.images, whole.test.images)
    # The statistics are those of the images trained on, not of the ones held back.
    np.testing.assert_allclose(cut.mean, (cut.train.images / 255).mean((0, 1, 2)), rtol=1e-9)


def test_image_size_averages():
    data, small = load("digits"), load("digits", image_size=4)
    assert small.image_shape == (4, 4, 1)
    means = data.test.images.reshape(-1, 4, 2, 4, 2, 1).mean(axis=(2, 4))
    assert np.abs(small.test.images - means).max() <= 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "no data set named 'mnist'; there are digits, cifar10, cifar10_jpeg,"),
        ({"name": "image_folder"}, "no data set named 'image_folder'; .*image_folder:NAME"),
        ({"name": "digits", "image_size": 3}, "image_size=3 must divide .* 8 x 8 pixels"),
        ({"name": "digits", "image_size": 0}, "image_size must be 1 or more pixels, got 0"),
        ({"name": "digits", "validation": 1397}, "validation=1397 must be .* the 1397 training"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(arguments.pop("name"), **arguments)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cifar10", "cifar10 --data_dir={}"),
        ("cifar10_jpeg", "cifar10_jpeg --source=PATH --data_dir={}"),
        ("image_folder:bugs", "image_folder --source=PATH --name=bugs --data_dir={}"),
    ],
)
@pytest.mark.parametrize("by_environment", [False, True])
def test_what_is_not_prepared_says_how_to(tmp_path, monkeypatch, name, command, by_environment):
    data_dir = tmp_path / "data"
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir if by_environment else tmp_path / "other"))
    command = command.format(data_dir)
    message = f"{name} is not prepared in {data_dir} .*`python -m ab_jax.data.prepare {command}`"
    with pytest.raises(FileNotFoundError, match=message):
        load(name, data_dir=None if by_environment else data_dir)


def test_the_newest_version_is_read(tmp_path):
    assert find_prepared("cifar10", tmp_path) is None
    for version in ("3.0.2", "3.0.10", "2.9.9", "incomplete.AB_4.0.0"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").touch()
    (tmp_path / "cifar10" / "5.0.0").mkdir()  # nothing in it
    assert find_prepared("cifar10", tmp_path) == tmp_path / "cifar10" / "3.0.10"
