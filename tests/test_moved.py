"""Old names of modules: each answers with the new one and says so, also as a command."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import experiments  # noqa: F401 its own moved modules
from ab_jax.moved import MOVED, MovedModules

ROOT = Path(__file__).parents[1]
FINDERS = [finder for finder in sys.meta_path if isinstance(finder, MovedModules)]


def imported(old: str) -> types.ModuleType:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=rf"{old} is called [\w.]+ now; the old name goes"):
        return importlib.import_module(old)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_answers_with_the_new_one(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    found = imported(old)
    public = {name: value for name, value in vars(new).items() if not name.startswith("__")}
    assert public
    for name, value in public.items():
        assert getattr(found, name) is value, name
    assert new.__name__ == MOVED[old]


def test_what_never_was_is_not_found() -> None:
    for name in ("ab_jax.nowhere", "experiments.nowhere", "nowhere"):
        assert all(finder.find_spec(name, None) is None for finder in FINDERS)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_every_old_name_is_free_and_every_new_one_stands() -> None:
    moved = {old: new for finder in FINDERS for old, new in finder.moved.items()}
    assert moved.keys() > MOVED.keys()
    for old, new in moved.items():
        path = ROOT / new.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), new
        path = ROOT / old.replace(".", "/")
        assert not path.is_dir(), old
        assert not path.with_suffix(".py").is_file(), old


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["ab_jax.training.manifest", "nowhere"],
            "error: nowhere must be a checkpoint's directory",
        ),
        (["experiments.guides.linen", "--help"], "--seed"),
    ],
)
def test_an_old_command_runs(words: list[str], told: str) -> None:
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told in done.stdout + done.stderr
    assert f"{words[0]} is called" in done.stderr
