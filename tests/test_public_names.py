"""What a user imports is listed once, in docs/library.md; examples import nothing else of ours."""

import importlib
import re
from pathlib import Path

import pytest

import ab_jax

ROOT = Path(__file__).parents[1]
LIBRARY = (ROOT / "docs/library.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(ab_jax[\w.]*)` \| (.*) \|$", LIBRARY, re.MULTILINE)
LISTED = {module: set(re.findall(r"`(\w+)`", names)) for module, names in ROWS}
SHOWN = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*.py"))]


@pytest.mark.parametrize("module", LISTED)
def test_what_is_listed_can_be_imported(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in LISTED[module] if not hasattr(found, name)] == []


def test_the_list_stands() -> None:
    assert len(ROWS) == len(LISTED) > 15
    assert all(names for module, names in LISTED.items() if module != "ab_jax")


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_what_is_shown_to_users_is_listed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    listed = {**LISTED, "ab_jax": {*ab_jax.__all__, "nnx", "linen"}}
    for module, names in re.findall(
        r"^(?:>>> )?from (ab_jax[\w.]*) import (\([^)]*\)|.*)$", text, re.MULTILINE
    ):
        for name in re.findall(r"(\w+)(?: as \w+)?(?:,|$)", names.strip("()\n ")):
            assert name in listed.get(module, set()), f"{module} {name}"
