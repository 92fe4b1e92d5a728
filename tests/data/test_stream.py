"""Streams: which photographs make up which batch, by any number of workers and processes."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ab_jax.data import epoch_order
from ab_jax.data.dataset import Images
from ab_jax.data.jpeg import center_crop
from ab_jax.data.prepare import prepare_image_folder
from ab_jax.data.stream import StreamedDataset, load_stream

TRAIN, TEST = 14, 5  # photographs of each of two classes
SIZE = 8


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of many sizes, each of one colour that no other has."""
    directory = tmp_path_factory.mktemp("photos")
    number = 0
    for split, count in {"train": TRAIN, "val": TEST}.items():
        for class_name in ("ant", "bee"):
            for index in range(count):
                shape = (20 + 3 * (number % 7), 30 + number % 11, 3)
                pixels = np.full(shape, 5 * number, np.uint8)
                path = directory / "source" / split / class_name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                number += 1
    prepare_image_folder(directory / "source", "photos", directory / "data")
    return directory / "data"


@pytest.fixture
def open_stream(data_dir: Path) -> Callable[..., StreamedDataset]:
    def make(**settings: object) -> StreamedDataset:
        given = {"image_size": SIZE, "data_dir": data_dir, "validation": 4, **settings}
        return load_stream("image_folder:photos", **given)  # type: ignore[arg-type]

    return make


def colours(images: Images) -> list[int]:
    flat = images.images.reshape(len(images), -1)
    assert (flat == flat[:, :1]).all()
    return [int(value) for value in flat[:, 0]]


def test_parts_share_out_the_photographs(open_stream: Callable[..., StreamedDataset]) -> None:
    data = open_stream()
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 4, 10)
    assert data.class_names == ("ant", "bee")
    assert data.image_shape == (SIZE, SIZE, 3)
    found = [
        [(int(image[0, 0, 0]), label) for image, label in part.read(range(len(part)))]
        for part in (data.train, data.validation, data.test)
    ]
    expected = [(5 * i, int(i >= TRAIN)) for i in range(2 * TRAIN)]
    assert sorted(found[0] + found[1]) == expected
    first = 2 * TRAIN
    assert sorted(found[2]) == [(5 * (first + i), int(i >= TEST)) for i in range(2 * TEST)]


def test_batches_follow_the_order_of_each_epoch(
    open_stream: Callable[..., StreamedDataset], rng: np.random.Generator
) -> None:
    seed = int(rng.integers(2**31))
    train = open_stream().train
    batches = list(train.train_batches(seed, batch_size=7, first_step=0, steps=7))
    assert len(batches) == 7
    for step, batch in enumerate(batches):
        epoch, place = divmod(step, 3)  # 24 photographs make three batches of 7
        chosen = epoch_order(seed, epoch, 24)[7 * place : 7 * place + 7]
        expected = list(train.read(chosen))
        assert colours(batch) == [int(image[0, 0, 0]) for image, _ in expected]
        assert batch.labels.tolist() == [label for _, label in expected]


@pytest.mark.long
def test_neither_workers_nor_the_start_nor_shares_change_a_batch(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    # Photographs with something to see in them, so that crops would show.
    seed = int(rng.integers(2**31))
    for split in ("train", "val"):
        for index in range(9):
            path = tmp_path / "source" / split / "all" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(path)
    prepare_image_folder(tmp_path / "source", "noise", tmp_path / "data")

    def batches(first_step: int = 0, **settings: object) -> list[np.ndarray]:
        given = {"image_size": SIZE, "data_dir": tmp_path / "data", "validation": 1, **settings}
        train = load_stream("image_folder:noise", **given).train  # type: ignore[arg-type]
        return [batch.images.copy() for batch in train.train_batches(seed, 4, first_step, 6)]

    plain = batches()
    assert len(plain) == 6
    # Another crop of a photograph whenever it comes again.
    assert len({batch.tobytes() for batch in plain}) == 6
    for same in (batches(workers=2), batches(workers=1)):
        np.testing.assert_array_equal(same, plain)
    for workers in (0, 2):
        np.testing.assert_array_equal(batches(3, workers=workers), plain[3:])
    halves = [batches(share=(i, 2)) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), plain)
    assert batches(6) == []


@pytest.mark.parametrize(("batch_size", "shares"), [(4, 1), (10, 1), (64, 1), (4, 2)])
def test_an_evaluation_sees_each_photograph_once(
    open_stream: Callable[..., StreamedDataset], batch_size: int, shares: int
) -> None:
    seen = []
    for i in range(shares):
        test = open_stream(share=(i, shares)).test
        for batch, mask in test.evaluation_batches(batch_size):
            assert batch.images.shape == (batch_size // shares, SIZE, SIZE, 3)
            pairs = zip(colours(batch), batch.labels.tolist(), strict=True)
            seen += [pair for pair, counts in zip(pairs, mask, strict=True) if counts]
    whole = open_stream().test
    expected = list(whole.read(range(len(whole))))
    assert sorted(seen) == sorted((int(image[0, 0, 0]), label) for image, label in expected)
    [(image, _)] = whole.read([0])
    center = np.empty((SIZE, SIZE, 3), np.uint8)
    center_crop(image, center)
    np.testing.assert_array_equal(next(whole.evaluation_batches(1))[0].images[0], center)
    # In any order, and the same whatever the process's share.
    order = np.arange(len(whole))[::-2]
    for part in (whole, open_stream(share=(1, 2)).test):
        drawn = part.centers(order)
        assert [*zip(colours(drawn), drawn.labels.tolist(), strict=True)] == [
            (int(image[0, 0, 0]), label) for image, label in (expected[i] for i in order)
        ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_photograph_is_named_with_its_record(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    from ab_jax.data import sources

    for split in ("train", "val"):
        for index in range(4):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            file = buffer.getvalue()
            path = tmp_path / "source" / split / "all" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file[: len(file) // 2] if index == 2 else file)
    # Preparing refuses such a file; other people's preparing may not.
    monkeypatch.setattr(sources, "decode", lambda encoded, name: None)
    directory = prepare_image_folder(tmp_path / "source", "cut", tmp_path / "data")
    train = load_stream(
        "image_folder:cut",
        image_size=SIZE,
        data_dir=tmp_path / "data",
        validation=0,
        workers=workers,
    ).train
    cut = next(i for i in range(4) if not _is_whole(train, i))
    with pytest.raises(ValueError, match=r"train/all/2\.jpg") as error:
        list(train.train_batches(0, 2, 0, 2))
    assert f"record {cut} of train in {directory}" in str(error.value)


def _is_whole(photos: object, index: int) -> bool:
    try:
        list(photos.read([index]))  # type: ignore[attr-defined]
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0 must be at least 1 pixel"),
        ({"workers": -1}, "workers=-1 at least 0"),
        ({"share": (2, 2)}, r"share=\(2, 2\) must be"),
        ({"validation": 28}, "validation=28 must be 0 or more and less than the 28 training"),
    ],
)
def test_what_makes_no_sense_is_refused(
    open_stream: Callable[..., StreamedDataset], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_stream(**settings)


def test_a_batch_that_cannot_be_shared_is_refused(
    open_stream: Callable[..., StreamedDataset],
) -> None:
    train = open_stream(share=(0, 3)).train
    with pytest.raises(ValueError, match="A batch of 8 images cannot be shared evenly by 3"):
        train.train_batches(0, 8, 0, 1)


def test_what_is_not_prepared_is_named_with_the_command(tmp_path: Path) -> None:
    command = rf"ab_jax\.data\.prepare imagenet2012 --source=PATH --data_dir={tmp_path}"
    with pytest.raises(FileNotFoundError, match=command):
        load_stream("imagenet2012", image_size=224, data_dir=tmp_path)


def test_workers_end_with_a_run_that_is_killed() -> None:
    """A killed process cannot end its workers: they look after it themselves."""
    code = (
        "import multiprocessing, time\n"
        "from ab_jax.data import stream\n"
        "if __name__ == '__main__':\n"
        "    batches = stream._stream(abs, 1000, 1)\n"
        "    next(batches)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        (worker,) = map(int, process.stdout.readline().split())
        os.kill(worker, 0)  # it is there
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while alive(worker):
            assert time.monotonic() < deadline, f"the worker {worker} goes on"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
