"""Writing files whole, and what is said when the disk is full or cannot be written.

/dev/full is a device that is always full; a directory below a file can be made by nobody, root
included.
"""

import errno
import os
from pathlib import Path

import pytest

from ab_jax import files
from ab_jax.files import append_line, read_lines, write_whole, writing

FULL = Path("/dev/full")


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    path = tmp_path / "record.json"
    write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((files.os, "fsync") if cut == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="cannot be written: No space left") as error:
        write_whole(path, b"new")
    assert str(error.value).startswith(str(path))
    assert "Free space on that disk, then give the same command again" in str(error.value)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_line_for_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(FULL)
    with pytest.raises(OSError, match="No space left on device") as error:
        append_line(path, "{}")
    assert str(path) in str(error.value)


def test_lines_are_read_as_written_but_for_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    for line in ("one", "two"):
        append_line(path, line)
    assert read_lines(path) == ["one", "two"]
    path.write_text(path.read_text() + "thr")
    assert read_lines(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "Free space on that disk"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "choose another directory"),
        (errno.EACCES, "choose another directory"),
        (errno.EIO, "Mend that"),
    ],
)
def test_an_error_keeps_its_kind_and_names_the_fix(number: int, fix: str) -> None:
    with (
        pytest.raises(OSError, match="x/y cannot be written") as error,
        writing(Path("x/y")),
    ):
        raise OSError(number, os.strerror(number))
    assert fix in str(error.value)
    assert isinstance(error.value, PermissionError) == (number == errno.EACCES)
