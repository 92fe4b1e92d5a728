"""No byte that feeds the record of a run changes unseen, nor what stands in its place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ab_jax.training.records import RunDirectory

CONFIG = {"epochs": 2.0, "learning_rate": 0.125, "name": "x"}
STEPS = (4, 8, 12)


def open_run(path: Path, **changes: Any) -> RunDirectory:
    allow = changes.pop("allow_changed", False)
    config = {**CONFIG, **changes}
    return RunDirectory(path, experiment="m", config=config, allow_changed=allow)


@pytest.fixture
def lines(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [{"step": step, "loss": float(rng.uniform(1, 2))} for step in STEPS]


@pytest.fixture
def cut_off(tmp_path: Path, lines: list[dict[str, Any]]) -> tuple[Path, Any]:
    """A run that was cut off after its third line, and what the checkpoint of step 8 holds."""
    with open_run(tmp_path / "run") as run:
        run.write_metrics(lines[0])
        run.write_metrics(lines[1])
        seal = json.loads(json.dumps(run.seal()))
        run.write_metrics(lines[2])
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    return tmp_path / "run", seal


def resume(path: Path, seal: Any, **changes: Any) -> list[dict[str, Any]]:
    with open_run(path, **changes) as run:
        run.forget_after(8, seal)
        return run.metrics


def flip_a_digit(text: bytes, rng: np.random.Generator) -> bytes:
    digits = [i for i, byte in enumerate(text) if byte in b"123456789"]
    at = int(rng.choice(digits))
    return text[:at] + bytes([ord("0") + (text[at] - ord("0")) % 9 + 1]) + text[at + 1 :]


def test_a_run_that_nobody_touched_goes_on(cut_off: tuple[Path, Any], lines: Any) -> None:
    path, seal = cut_off
    # The last line may have been cut off anywhere: no checkpoint knows it yet.
    whole = (path / "metrics.jsonl").read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in (len(whole), len(whole) - 1, (start + len(whole)) // 2, start):
        (path / "metrics.jsonl").write_bytes(whole[:end])
        assert resume(path, seal) == lines[:2]
    assert resume(path, seal[:1]) == lines[:1]  # from an earlier checkpoint


DAMAGES: dict[str, Callable[[list[bytes], np.random.Generator], list[bytes]]] = {
    "deleted": lambda lines, rng: lines[1:],
    "last deleted": lambda lines, rng: lines[:1],
    "doubled": lambda lines, rng: [lines[0], *lines],
    "swapped": lambda lines, rng: [lines[1], lines[0], lines[2]],
    "cut": lambda lines, rng: [lines[0], lines[1][: int(rng.integers(1, len(lines[1])))]],
    "flipped": lambda lines, rng: [flip_a_digit(lines[0], rng), *lines[1:]],
    "emptied": lambda lines, rng: [],
    "blank": lambda lines, rng: [lines[0].replace(b", ", b",  "), *lines[1:]],
    "5": lambda lines, rng: [b"5\n", *lines[1:]],
    "object": lambda lines, rng: [b"{}\n", *lines[1:]],
    "text": lambda lines, rng: [b'{"step": "a"}\n', *lines[1:]],
    "bool": lambda lines, rng: [b'{"step": true}\n', *lines[1:]],
    "nan": lambda lines, rng: [b'{"step": 4, "loss": NaN}\n', *lines[1:]],
    "deep": lambda lines, rng: [b"[" * 100_000 + b"\n", *lines[1:]],
    "no utf-8": lambda lines, rng: [lines[0][:9] + b"\xff" + lines[0][9:], *lines[1:]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_line_is_named_with_the_way_out(
    cut_off: tuple[Path, Any], rng: np.random.Generator, damage: str
) -> None:
    path, seal = cut_off
    file = path / "metrics.jsonl"
    changed = b"".join(DAMAGES[damage](file.read_bytes().splitlines(True), rng))
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=r"metrics\.jsonl (was changed|is damaged)") as error:
        resume(path, seal)
    assert f"remove {path} to begin anew" in str(error.value)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == changed


def test_deleted_metrics_are_missed(cut_off: tuple[Path, Any]) -> None:
    path, seal = cut_off
    (path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"line 1, which the checkpoint of 8 knows, is missing"):
        resume(path, seal)


@pytest.mark.parametrize("damage", ["flipped", "deleted", "cut", "[]", "", "no utf-8", "deep"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_changed_configuration_is_named_with_the_way_out(
    cut_off: tuple[Path, Any], rng: np.random.Generator, damage: str, sealed: bool
) -> None:
    """Also where older code sealed nothing, as far as it shows."""
    path, seal = cut_off
    file = path / "config.json"
    whole = file.read_bytes()
    if not sealed:
        (path / "config.json.sha256").unlink()
    if damage == "deleted":
        file.unlink()
    elif damage == "flipped":
        at = whole.index(b'"started"')  # which no flag is compared with
        file.write_bytes(whole[:at] + flip_a_digit(whole[at:], rng))
    else:
        changed = {"cut": whole[: len(whole) // 2], "no utf-8": b"\xff" + whole}
        changed |= {"deep": b"[" * 100_000}
        file.write_bytes(changed.get(damage, damage.encode()))
    if damage == "flipped" and not sealed:
        resume(path, seal)
        return
    with pytest.raises(ValueError, match=r"config\.json is (missing|not as|damaged)") as error:
        resume(path, seal)
    assert f"remove {path} to begin anew" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_older_configuration_is_sealed_when_its_run_goes_on(cut_off: tuple[Path, Any]) -> None:
    path, seal = cut_off
    (path / "config.json.sha256").unlink()
    resume(path, seal)
    file = path / "config.json"
    file.write_bytes(file.read_bytes().replace(b"started", b"Started"))
    with pytest.raises(ValueError, match="is not as it was written"):
        resume(path, seal)


def test_a_change_that_is_allowed_may_be_cut_off_anywhere(
    cut_off: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the files is the last to be replaced, the run goes on, and tells of the change
    once it has been noted."""
    path, seal = cut_off
    replace, left = Path.replace, 0

    def until_cut(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    before = shutil.copytree(path, path.with_name("before"))
    for files in range(1, 10):
        shutil.rmtree(path)
        shutil.copytree(before, path)
        left = files
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", until_cut)
            try:
                resume(path, seal, learning_rate=0.5, allow_changed=True)
                break
            except KeyboardInterrupt:
                pass
        resume(path, seal, learning_rate=0.5, allow_changed=True)
        changed = json.loads((path / "config.json").read_text())["changed"]
        assert [(c["was"], c["is"]) for c in changed] == [(0.125, 0.5)]
    assert files == 4  # lines, seal of both, configuration, its seal: then it was done


@pytest.mark.parametrize("what", ["metrics", "line", "config", "directory"])
def test_what_is_changed_while_a_run_goes_on_ends_it_without_a_record(
    tmp_path: Path, lines: Any, what: str
) -> None:
    path = tmp_path / "run"
    with open_run(path) as run:
        run.write_metrics(lines[0])
        run.write_metrics(lines[1])
        if what == "directory":  # Orbax makes it anew
            shutil.rmtree(path)
            (path / "checkpoints").mkdir(parents=True)
        elif what == "line":
            text = (path / "metrics.jsonl").read_text()
            (path / "metrics.jsonl").write_text(text.replace('"step": 8', '"step": 9'))
        else:
            (path / {"metrics": "metrics.jsonl", "config": "config.json"}[what]).unlink()
        for call in (run.seal, lambda: run.complete({})):
            with pytest.raises(ValueError, match=r"was changed|is missing") as error:
                call()
            assert str(path) in str(error.value)
    assert not (path / "record.json").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_no_record_can_hold_is_named_at_once(tmp_path: Path, number: float) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(ValueError, match=rf"quantized_loss is {number} at step 4") as error:
            run.write_metrics({"step": 4, "quantized_loss": number})
        assert "Lower the learning rate" in str(error.value)
        assert run.metrics == []


# What stands in the place of a file


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "directory"])
def test_a_lock_that_is_none_is_named_and_left_alone(cut_off: tuple[Path, Any], kind: str) -> None:
    path, seal = cut_off
    lock, config = path / "lock", (path / "config.json").read_bytes()
    lock.unlink()
    if kind == "link":
        lock.symlink_to(path / "config.json")
    elif kind == "hard link":
        os.link(path / "config.json", lock)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(ValueError, match=r"lock is no lock, but a link or another file. Remove it"):
        resume(path, seal)
    assert (path / "config.json").read_bytes() == config


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "config.json.sha256"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_a_file_that_is_none_is_named(cut_off: tuple[Path, Any], name: str, kind: str) -> None:
    path, seal = cut_off
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    else:
        (path / name).mkdir()
    with pytest.raises(ValueError, match=f"{path / name} is no regular file"):
        resume(path, seal)
