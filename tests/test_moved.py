"""Old names of modules: each answers with the new one and says so, also as a command."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ab_jax.moved import MOVED, MovedModules

ROOT = Path(__file__).parents[1]


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
    for name in ("ab_jax.nowhere", "nowhere"):
        assert MovedModules().find_spec(name, None) is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_every_old_name_is_free() -> None:
    for old in MOVED:
        path = ROOT / old.replace(".", "/")
        assert not path.is_dir(), old
        assert not path.with_suffix(".py").is_file(), old


def test_an_old_command_runs() -> None:
    command = [sys.executable, "-m", "ab_jax.training.manifest", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "error: nowhere must be a checkpoint's directory" in done.stderr
    assert "ab_jax.training.manifest is called ab_jax.training.seals now" in done.stderr
