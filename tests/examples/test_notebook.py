"""The notebook runs from top to bottom, and what it shows is what it printed when it did."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/first_steps.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook: nbformat.NotebookNode) -> str:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return "\n".join(out["text"] for c in cells for out in c.outputs if out.get("name") == "stdout")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """A copy after its run; an exception in a cell, or none, ends in an error here."""
    notebook = read()
    where = {"metadata": {"path": tmp_path_factory.mktemp("notebook")}}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    NotebookClient(notebook, timeout=300, resources=where).execute(env=env)
    return notebook


def accuracies(text: str) -> dict[str, float]:
    rows = re.findall(r"^(float|rounded after training|STE|AB) +([\d.]+)%$", text, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def test_its_networks_learn(executed: nbformat.NotebookNode) -> None:
    found = accuracies(printed(executed))
    assert found.keys() == {"float", "rounded after training", "STE", "AB"}
    assert found["float"] > 93
    assert found["AB"] > 90
    assert found["STE"] > 90


def test_it_is_shown_as_it_was_run_once(executed: nbformat.NotebookNode) -> None:
    """In order, to the end; what does not depend on the processor is shown as it is printed now."""
    shown = read()
    counts = [cell.execution_count for cell in shown.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    (old, new) = (printed(notebook) for notebook in (shown, executed))
    assert accuracies(old).keys() == accuracies(new).keys()
    for pattern in (r"path +shape.*?total[^\n]*", r"[\d,]+ bytes; in float32 [\d,]+"):
        assert re.findall(pattern, old, re.DOTALL) == re.findall(pattern, new, re.DOTALL)
        assert re.search(pattern, new, re.DOTALL)
