"""ImageNet as TFDS's own builder lays it out, with generated photographs in its place."""

from pathlib import Path

import numpy as np
import pytest

from ab_jax.data.load import facts
from ab_jax.data.stream import IMAGENET_MEAN, load_stream
from benchmarks.measuring.generated_imagenet import (
    SIZES,
    photo,
    prepare_generated_imagenet,
    synsets,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("imagenet")
    prepared = prepare_generated_imagenet(directory, train=60, validation=20, seed=0)
    assert prepared == directory / "imagenet2012" / "5.1.0"
    return directory


def test_the_layout_is_read_whole(data_dir: Path) -> None:
    data = load_stream("imagenet2012", image_size=224, data_dir=data_dir)
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 20)
    assert data.version == "5.1.0"
    assert data.class_names == tuple(synsets())
    assert data.num_classes == 1000
    assert (data.class_names[0], data.class_names[-1]) == ("n01440764", "n15075141")
    assert data.mean == IMAGENET_MEAN
    told = facts(data)
    assert told["class_names"] == synsets()
    assert (told["classes"], told["std"]) == (1000, [0.229, 0.224, 0.225])
    for parts in ([data.train, data.validation], [data.test]):
        read = [pair for part in parts for pair in part.read(range(len(part)))]
        assert sorted(label for _, label in read) == list(range(len(read)))
        assert {image.shape[:2] for image, _ in read} <= set(SIZES)


def test_batches_are_of_the_networks_size(data_dir: Path) -> None:
    train = load_stream("imagenet2012", image_size=224, data_dir=data_dir, validation=0).train
    (batch,) = train.train_batches(0, 16, 2, 3)
    assert batch.images.shape == (16, 224, 224, 3)
    assert batch.labels.dtype == np.int32


def test_damage_is_named_with_the_files_own_name(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ab_jax.data import stream

    class Cut:
        def __getitems__(self, records: list[int]) -> list[dict[str, object]]:
            whole = photo(np.random.default_rng(records[0]), 90, 120)
            return [{"file_name": b"n01440764_3.JPEG", "image": whole[:-500], "label": 0}]

    monkeypatch.setattr(stream, "source_of", lambda directory, split: Cut())
    train = load_stream("imagenet2012", image_size=32, data_dir=data_dir).train
    with pytest.raises(ValueError, match=r"n01440764_3\.JPEG \(record 7 of train in .*2012/5"):
        list(train.read([7]))


def test_generated_photographs_weigh_what_real_ones_do(rng: np.random.Generator) -> None:
    # ImageNet's training images have 110 KB on average, and 400 x 350 pixels.
    sizes = [len(photo(rng, 375, 500)) for _ in range(10)]
    assert 50_000 < np.mean(sizes) < 200_000


def test_preparing_the_real_one_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ab_jax.data.prepare import main

    with pytest.raises(SystemExit, match=r"there is no ILSVRC2012_img_train\.tar in"):
        main(["imagenet2012", f"--source={tmp_path}", f"--data_dir={tmp_path}"])
