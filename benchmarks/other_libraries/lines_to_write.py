"""What a user writes to quantize a network: the lines in which `snippets` differ from float."""

import ast
import difflib
import inspect
from types import ModuleType

from benchmarks.other_libraries.snippets import plain, with_ab, with_aqt, with_aqt_mended, with_qwix

#: By the name in tables. Both of our estimators, and both of Qwix's providers, are written alike.
SNIPPETS: dict[str, ModuleType] = {
    "ab_jax": with_ab,
    "Qwix": with_qwix,
    "AQT": with_aqt,
    "AQT, mended": with_aqt_mended,
}


def lines_to_write(snippet: ModuleType) -> dict[str, int]:
    """How many lines of code are new or changed: in the network itself, and in all."""
    before, after = _code(plain), _code(snippet)
    changed = {
        "network": _new(before["network"], after["network"]),
        "rest": _new(before["rest"], after["rest"]),
    }
    return {"network": changed["network"], "all": sum(changed.values())}


def _new(before: list[str], after: list[str]) -> int:
    return sum(line.startswith("+ ") for line in difflib.ndiff(before, after))


def _code(module: ModuleType) -> dict[str, list[str]]:
    """Lines of code without the docstring and blank ones, those of the network's class apart."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    tree = ast.parse(source)
    (network,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    docstring = tree.body[0].end_lineno or 0
    inside = range(network.lineno - 1, network.end_lineno or 0)
    rest = [line for i, line in enumerate(lines) if i >= docstring and i not in inside]
    return {
        "network": [lines[i] for i in inside if lines[i].strip()],
        "rest": [line for line in rest if line.strip()],
    }
