"""Which checkpoints are used, kept and removed: on directories with a file or two in them."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from ab_jax.training.retention import (
    DamagedCheckpointWarning,
    NoWholeCheckpointError,
    newest_whole,
    remove_replaced,
    seal,
    written,
)


def write(directory: Path, step: int, accuracy: float | None = None) -> Path:
    path = directory / str(step)
    (written(path) / "network").mkdir(parents=True)
    (written(path) / "network" / "data").write_text(f"weights of {step}")
    seal(path, accuracy)
    return path


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_newest_is_used_where_all_are_whole(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "nothing") is None
    for step in (4, 12, 8, 100):
        write(tmp_path, step)
    assert newest_whole(tmp_path) == 100


def told_by(directory: Path, expected: int | None) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert newest_whole(directory) == expected
    assert {warning.category for warning in told} <= {DamagedCheckpointWarning}
    return [str(warning.message) for warning in told]


def test_damaged_ones_are_passed_over_and_named(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        write(tmp_path, step)
    (tmp_path / "16" / "MANIFEST").unlink()
    (tmp_path / "12" / "network" / "data").unlink()
    for step in (2, 20):  # the older one is nobody's business
        (tmp_path / f"{step}.writing.orbax-checkpoint-tmp").mkdir()
    before = names(tmp_path)
    messages = told_by(tmp_path, 8)
    assert len(messages) == 3
    assert f"{tmp_path}/16/MANIFEST is missing" in messages[0]
    assert f"{tmp_path}/12/network/data is missing" in messages[1]
    assert f"writing of {tmp_path}/20.writing.orbax-checkpoint-tmp was cut off" in messages[2]
    assert all("That of step 8 is used" in message for message in messages)
    assert names(tmp_path) == before


def test_a_first_write_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    """There is nothing to go back to, and nothing lost but the first interval."""
    for name in ("4.writing", "4.writing.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
        (message,) = told_by(tmp_path, None)
        assert f"writing of {tmp_path / name} was cut off. There is none before it" in message
        (tmp_path / name).rmdir()


def test_where_none_is_whole_the_error_names_all_and_what_to_delete(tmp_path: Path) -> None:
    (write(tmp_path, 4) / "network" / "data").write_text("weights of 5")
    (write(tmp_path, 8) / "MANIFEST").unlink()
    with pytest.raises(NoWholeCheckpointError, match="none is whole") as error:
        newest_whole(tmp_path)
    message = str(error.value)
    assert f"{tmp_path}/4/network/data is not as it was written" in message
    assert f"{tmp_path}/8/MANIFEST is missing" in message
    assert f"delete {tmp_path} to begin anew" in message


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_and_the_best_are_kept(
    rng: np.random.Generator, tmp_path: Path, keep: int
) -> None:
    accuracies: dict[int, float] = {}
    for step in range(1, 20):
        accuracies[step] = float(rng.choice([0.25, 0.5, rng.uniform()]))
        write(tmp_path, step, accuracies[step])
        remove_replaced(tmp_path, step, keep)
        best = max(accuracies, key=lambda step: (accuracies[step], step))
        last = range(max(1, step - keep + 1), step + 1)
        assert names(tmp_path) == {str(s) for s in {*last, best}}


def test_without_accuracies_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        write(tmp_path, step)
        remove_replaced(tmp_path, step, keep=2)
    assert names(tmp_path) == {"12", "16"}


def test_what_is_damaged_goes_when_a_whole_one_has_passed_it(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (write(tmp_path, 16) / "network" / "data").write_text("otherwise")
    (tmp_path / "8.writing.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.txt").touch()
    for _ in range(3):
        write(tmp_path, 8)
    assert names(tmp_path) >= {"4", "8", "8.damaged", "8.damaged1"}
    remove_replaced(tmp_path, 8, keep=1)
    # 16 is not the newest, for all its number: it neither counts nor goes.
    assert names(tmp_path) == {"8", "16", "notes.txt"}
    write(tmp_path, 20)
    remove_replaced(tmp_path, 20, keep=1)
    assert names(tmp_path) == {"20", "notes.txt"}


# What else may lie there


def test_a_checkpoint_by_another_name_is_none(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8).rename(tmp_path / "1008")
    (message,) = told_by(tmp_path, 4)
    assert f"{tmp_path}/1008 is that of step 8, whose name it must have" in message
    (tmp_path / "4" / "MANIFEST").unlink()
    with pytest.raises(NoWholeCheckpointError, match="1008 is that of step 8"):
        newest_whole(tmp_path)
    (tmp_path / "1008").rename(tmp_path / "8")
    assert newest_whole(tmp_path) == 8


def test_entries_that_are_no_checkpoints_are_named_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "99").write_text("a file")
    (tmp_path / "0099").mkdir()
    (tmp_path / "\u0663").mkdir()  # an Arabic 3
    (tmp_path / "5").symlink_to("4")
    messages = told_by(tmp_path, 4)
    assert any(f"{tmp_path}/99 is no directory" in message for message in messages)
    assert any(f"{tmp_path}/0099 has no checkpoint's name" in message for message in messages)
    assert any(f"{tmp_path}/5 is that of step 4" in message for message in messages)
    before = names(tmp_path)
    for step in (120, 121):
        write(tmp_path, step)
        remove_replaced(tmp_path, step, keep=1)
    assert names(tmp_path) == before - {"4"} | {"121"}
    assert newest_whole(tmp_path) == 121


def test_a_manifest_that_is_a_directory_is_named_and_goes_with_its_checkpoint(
    tmp_path: Path,
) -> None:
    write(tmp_path, 4)
    (write(tmp_path, 8) / "MANIFEST").unlink()
    (tmp_path / "8" / "MANIFEST").mkdir()
    (message,) = told_by(tmp_path, 4)
    assert f"{tmp_path}/8/MANIFEST is no file that can be read" in message
    write(tmp_path, 12)
    remove_replaced(tmp_path, 12, keep=1)
    assert names(tmp_path) == {"12"}


@pytest.mark.parametrize("about", ["[]", "5", "{}", '{"accuracy": "a"}', '{"accuracy": [1]}', ""])
def test_an_accuracy_that_cannot_be_read_is_less_than_any(tmp_path: Path, about: str) -> None:
    for step, accuracy in ((4, 0.5), (8, 0.25), (12, 0.0)):
        write(tmp_path, step, accuracy)
    (tmp_path / "4" / "about.json").write_text(about)
    remove_replaced(tmp_path, 12, keep=1)
    assert names(tmp_path) == {"8", "12"}
