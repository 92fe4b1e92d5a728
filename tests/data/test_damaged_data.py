"""Changed bytes in a prepared data set: nothing else is read, and what is wrong is named."""

import collections
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ab_jax.data import load
from ab_jax.data.prepare import prepare_image_folder
from ab_jax.data.prepared import source_of
from ab_jax.data.stream import load_stream

LIST = "checksums.json"
Read = Callable[[], list[object]]


@pytest.fixture
def directory(image_folder, tmp_path) -> Path:
    source, _ = image_folder({"train": 5, "val": 2}, size=4)
    return prepare_image_folder(source, "bugs", tmp_path / "data")


@pytest.fixture(params=["memory", "stream"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Read:
    """Everything of the data set, as values that compare."""

    def from_memory() -> list[object]:
        source_of.cache_clear()  # as in another process
        data = load("image_folder:bugs", data_dir=tmp_path / "data", validation=2)
        parts = [(p.images.tolist(), p.labels.tolist()) for p in data.parts.values()]
        return [data.class_names, data.version, parts]

    def from_stream() -> list[object]:
        source_of.cache_clear()
        given = {"image_size": 4, "data_dir": tmp_path / "data", "validation": 2}
        data = load_stream("image_folder:bugs", **given)
        parts = [
            [(image.tolist(), label) for image, label in part.read(range(len(part)))]
            for part in (data.train, data.validation, data.test)
        ]
        return [data.class_names, data.version, parts]

    return {"memory": from_memory, "stream": from_stream}[request.param]


def check(read: Read, directory: Path, expected: list[object]) -> str:
    """Reads what may be damaged: "same", or "named" where an error says what and what to do."""
    for kept in directory.glob("decoded-*"):
        kept.unlink()
    try:
        found = read()
    except ValueError as error:
        message = str(error)
        assert f"the data set in {directory} is damaged: " in message
        assert "Delete that directory and prepare it anew with `python -m ab_jax" in message
        assert f"--name=bugs --data_dir={directory.parents[2]}`" in message
        assert len(message.splitlines()) == 1
        return "named"
    assert found == expected
    return "same"


def test_no_changed_byte_is_read(read: Read, directory: Path, rng: np.random.Generator) -> None:
    expected = read()
    files = {path: path.read_bytes() for path in directory.iterdir() if "decoded" not in path.name}
    assert {"label.labels.txt", "dataset_info.json", "features.json", "metadata.json", LIST} < {
        path.name for path in files
    }
    for path, whole in files.items():
        small = len(whole) < 5000
        outcomes = collections.Counter()
        for place in rng.integers(0, len(whole), 12 if small else 6):
            changed = bytearray(whole)
            changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            outcomes[check(read, directory, expected)] += 1
        # A list may say the same with other white space.
        assert outcomes["named"] or path.name == LIST, path
        assert not outcomes["same"] or path.name == LIST, path
        path.write_bytes(whole)
    assert check(read, directory, expected) == "same"


def test_damage_in_500_bytes_at_once_is_named(
    read: Read, directory: Path, rng: np.random.Generator
) -> None:
    expected = read()
    for path in [p for p in directory.iterdir() if "decoded" not in p.name]:
        whole = path.read_bytes()
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), 500):
            changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        assert check(read, directory, expected) == "named" or bytes(changed) == whole
        path.write_bytes(whole)


@pytest.mark.parametrize("how", ["cut", "longer", "empty", "missing"])
def test_files_of_another_length_are_named(read: Read, directory: Path, how: str) -> None:
    expected = read()
    for path in [p for p in directory.iterdir() if "decoded" not in p.name]:
        if how == "missing" and path.name in ("dataset_info.json", LIST):
            continue  # no data set any more; as prepared before there were lists
        whole = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes({"cut": whole[:-1], "longer": whole + b" ", "empty": b""}[how])
        outcome = check(read, directory, expected)
        assert outcome == "named" or (path.name == LIST and how == "longer"), path
        path.write_bytes(whole)


def test_another_class_name_is_not_taken(read: Read, directory: Path) -> None:
    names = directory / "label.labels.txt"
    assert names.read_text().split() == ["ant", "bee"]
    names.write_text("ant\nwas\n")
    with pytest.raises(ValueError, match=r"damaged: label\.labels\.txt has other bytes than when"):
        read()


def test_large_records_are_hashed_when_all_of_them_are_read(
    image_folder: Callable, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Also in bytes that their own format does not cover; a stream reads without."""
    source, _ = image_folder({"train": 32, "val": 1}, size=80)
    directory = prepare_image_folder(source, "bugs", tmp_path / "data")
    (records,) = directory.glob("*-train.*")
    size = records.stat().st_size
    assert size > 2**20
    whole = records.read_bytes()
    for place in rng.integers(0, size, 4):
        changed = bytearray(whole)
        changed[place] ^= 1
        records.write_bytes(changed)
        source_of.cache_clear()
        with pytest.raises(ValueError, match=f"damaged: {records.name} has other bytes"):
            load("image_folder:bugs", data_dir=tmp_path / "data")
    # Within an image the records' own hash tells.
    source_of.cache_clear()
    changed = bytearray(whole)
    changed[whole.index(b"IDAT", size // 2) + 100] ^= 1
    records.write_bytes(changed)
    train = load_stream(
        "image_folder:bugs", image_size=80, data_dir=tmp_path / "data", validation=0
    ).train
    with pytest.raises(ValueError, match=f"data set in {directory} is damaged"):
        list(train.read(range(64)))


def test_data_of_before_are_read_without_a_word(
    read: Read, directory: Path, capsys: pytest.CaptureFixture, rng: np.random.Generator
) -> None:
    """Without a list; and damage that shows is named all the same."""
    expected = read()
    (directory / LIST).unlink()
    capsys.readouterr()
    assert check(read, directory, expected) == "same"
    assert capsys.readouterr() == ("", "")
    for name in ("dataset_info.json", "features.json"):
        path = directory / name
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"\xff" + whole, b"[]", b"5"):
            path.write_bytes(content)
            assert check(read, directory, expected) == "named", content
        path.write_bytes(whole)
    info = json.loads((directory / "dataset_info.json").read_bytes())
    info["splits"][0]["shardLengths"] = ["500"]
    (directory / "dataset_info.json").write_text(json.dumps(info))
    assert check(read, directory, expected) == "named"
