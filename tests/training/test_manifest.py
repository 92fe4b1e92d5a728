"""The manifest: what sha256sum says of it, and that no change to a checkpoint escapes it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ab_jax.training import seals
from ab_jax.training.seals import NAME, find_damage, write_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Files of random bytes, one of them empty, in directories of several depths."""
    path = tmp_path / "12"
    for name, size in {"a": 100, "sub/b": 1, "sub/deep/c d": 5000, "sub/empty": 0}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(rng.bytes(size))
    write_manifest(path)
    return path


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_sha256sum_agrees(checkpoint: Path) -> None:
    assert find_damage(checkpoint) is None
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    command = ["sha256sum", "--check", "--strict", NAME]
    told = subprocess.run(command, cwd=checkpoint, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) == 4


def test_any_flipped_bit_is_found(rng: np.random.Generator, checkpoint: Path) -> None:
    for path in files_of(checkpoint):
        data = path.read_bytes()
        # Every byte of the manifest, whose parts all mean something; some of the others.
        at = range(len(data)) if path.name == NAME else rng.integers(0, len(data) or 1, 20)
        for byte in at if data else ():
            flipped = bytearray(data)
            flipped[byte] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            found = find_damage(checkpoint)
            assert found is not None
            assert str(path if path.name != NAME else checkpoint) in found
        path.write_bytes(data)
    assert find_damage(checkpoint) is None


def test_a_cut_a_missing_and_a_foreign_file_are_named(checkpoint: Path) -> None:
    for path in files_of(checkpoint):
        data = path.read_bytes()
        if data and path.name != NAME:
            path.write_bytes(data[:-1])
            assert find_damage(checkpoint) == f"{path} is not as it was written"
        path.unlink()
        assert f"{path} is missing" in str(find_damage(checkpoint))
        path.write_bytes(data)
        foreign = path.with_name("foreign")
        foreign.touch()
        assert find_damage(checkpoint) == f"{foreign} is no part of it"
        foreign.unlink()
    # An item of Orbax's is a directory.
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to(".")):
        make(foreign := checkpoint / "foreign")
        assert find_damage(checkpoint) == f"{foreign} is no part of it"
        foreign.unlink() if foreign.is_symlink() else foreign.rmdir()
    (checkpoint / NAME).unlink()
    assert find_damage(checkpoint) == f"{checkpoint / NAME} is missing"


def test_a_checkpoint_without_a_manifest_gets_one_by_hand_alone(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "ab_jax.training.seals", str(checkpoint)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"{checkpoint} must be a checkpoint's directory, without a {NAME}" in refused.stderr
    stored = (checkpoint / NAME).read_bytes()
    (checkpoint / NAME).unlink()
    subprocess.run(command, cwd=ROOT, check=True)
    assert (checkpoint / NAME).read_bytes() == stored


@pytest.mark.parametrize("where", ["file", "manifest"])
def test_a_pipe_and_a_device_are_named_instead_of_waited_for(checkpoint: Path, where: str) -> None:
    path = checkpoint / ("sub/b" if where == "file" else NAME)
    path.unlink()
    os.mkfifo(path)
    assert str(path) in str(find_damage(checkpoint))
    path.unlink()
    path.symlink_to("/dev/zero")
    assert str(path) in str(find_damage(checkpoint))


def test_what_cannot_be_read_is_not_sealed(checkpoint: Path) -> None:
    (checkpoint / NAME).unlink()
    os.mkfifo(checkpoint / "pipe")
    with pytest.raises(SystemExit) as ended:
        seals.main([str(checkpoint)])
    assert f"error: {checkpoint}/pipe is unreadable (no regular file)" in str(ended.value)
    assert not (checkpoint / NAME).exists()
