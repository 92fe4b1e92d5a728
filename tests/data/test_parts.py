"""Streams and images in memory cut a data set into the same parts."""

import numpy as np
import pytest

from ab_jax.data import load
from ab_jax.data.prepare import prepare_image_folder
from ab_jax.data.stream import load_stream


@pytest.mark.parametrize("splits", [("test",), ("val",), ("val", "test")])
def test_the_parts_are_the_same(image_folder, tmp_path, splits):
    source, _ = image_folder({"train": 20} | dict.fromkeys(splits, 3), size=4)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    validations = [None] if len(splits) == 2 else [None, 0, 7]
    for validation in validations:
        given = {"data_dir": tmp_path / "data", "validation": validation}
        data = load("image_folder:bugs", **given)
        stream = load_stream("image_folder:bugs", image_size=4, **given)
        for part, images in data.parts.items():
            streamed = list(getattr(stream, part).read(range(len(images))))
            assert len(getattr(stream, part)) == len(images)
            assert [label for _, label in streamed] == images.labels.tolist()
            for (image, _), expected in zip(streamed, images.images, strict=True):
                np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(("splits", "validation"), [(("test",), 8), (("val", "test"), 3)])
def test_the_same_is_refused(image_folder, tmp_path, splits, validation):
    source, _ = image_folder({"train": 4} | dict.fromkeys(splits, 1), size=2)
    prepare_image_folder(source, "bugs", tmp_path / "data")
    given = {"data_dir": tmp_path / "data", "validation": validation}
    messages = []
    for open_ in (load, lambda *names, **words: load_stream(*names, image_size=2, **words)):
        with pytest.raises(ValueError, match=f"validation={validation}") as error:
            open_("image_folder:bugs", **given)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
