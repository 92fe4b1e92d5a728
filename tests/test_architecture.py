"""The order of the house: who may import whom, and how much a file may hold.

The rooms of `ab_jax` stand in a fixed order, and a file imports only from its own room and the
rooms above it. `experiments` import the library, `benchmarks` and `examples` both, and never the
other way round.
The tables below are the whole rule; adding a room or a dependency means adding it here. The checker
is tried on made-up trees first, so that it is known to be able to fail.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Top to bottom, each with the third parties it may load.
ROOMS: dict[str, set[str]] = {
    "scale_fits": {"jax", "numpy"},
    "even_levels": {"jax", "numpy"},
    "thresholds": {"jax", "numpy"},
    "bit_scales": {"jax", "numpy"},
    "quantized": {"jax", "numpy"},
    "fitting": {"jax"},
    "quantizers": {"jax", "numpy"},
    "carried_fits": {"jax"},
    "moved": set(),
    "schedules": {"jax", "numpy", "optax"},
    "estimators": {"jax", "numpy"},
    "learned_scales": {"jax", "numpy"},
    "rules": {"jax"},
    "describe": {"jax", "numpy"},
    "blend": {"jax", "numpy", "optax"},
    "weight_decay": {"jax", "optax"},
    "__init__": set(),  # the package itself: the core's public names, gathered
    "percentiles": {"jax"},
    "activations": {"jax", "numpy"},
    "products": {"jax", "numpy"},
    "flax_codes": {"jax", "numpy", "flax"},
    "input_ranges": {"jax", "numpy", "flax"},
    "linen_layers": {"jax", "numpy", "flax"},
    "linen": {"jax", "numpy", "flax"},
    "nnx": {"jax", "flax"},
    "safetensors_header": {"jax", "numpy"},
    "models": {"jax", "numpy", "flax"},
    "calibration": {"jax", "numpy", "optax"},
    "files": set(),
    "data": {
        *("jax", "numpy", "tensorflow_datasets", "grain", "absl", "array_record"),
        *("PIL", "cv2", "sklearn", "tyro", "rich"),
    },
    "training": {"jax", "numpy", "optax", "flax", "orbax", "rich", "tensorboardX"},
    "export": {
        *("jax", "numpy", "flax", "safetensors", "onnx", "onnxruntime", "qwix", "orbax"),
        *("ai_edge_litert", "flatbuffers"),
    },
}
ORDER = list(ROOMS)
# Each with what it may import of ours, beside itself.
PACKAGES: dict[str, set[str]] = {
    "ab_jax": set(),
    "experiments": {"ab_jax"},
    "benchmarks": {"ab_jax", "experiments"},
    "examples": {"ab_jax", "experiments"},
}
# One concept a file: this many classes and functions for others, and lines as it needs them.
MAX_PUBLIC = 22
MAX_LINES = 450
BANNED_NAMES = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}


class Import(NamedTuple):
    module: str  # absolute, as in `ab_jax.data.pixels`
    name: str | None  # `x` of `from module import x`
    line: int


def imports_of(tree: ast.AST, package: str) -> Iterator[Import]:
    """All imports of a file, wherever they stand; `package` is what a leading dot refers to."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, None, node.lineno)
            case ast.ImportFrom(module=module, names=names, level=level):
                if level:
                    base = package.split(".")[: len(package.split(".")) - level + 1]
                    module = ".".join([*base, *([module] if module else [])])
                for alias in names:
                    yield Import(module or "", alias.name, node.lineno)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield Import(module, None, node.lineno)


def room_of(imported: Import) -> str:
    """The room of `ab_jax` that an import enters."""
    parts = [*imported.module.split("."), *([imported.name] if imported.name else [])]
    # `from ab_jax import blend` may mean the room or the function of that name; both are the core.
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


def private_names(tree: ast.AST, found: list[Import]) -> Iterator[tuple[int, str]]:
    """Underscore names of our packages that a file reaches for."""
    ours = PACKAGES.keys()
    for module, name, line in found:
        if module.split(".")[0] in ours:
            for part in [*module.split("."), name or ""]:
                if part.startswith("_") and not part.startswith("__"):
                    yield line, part
    bound = {  # the names under which our modules are known in this file
        alias.asname
        or (alias.name if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in ours
        or getattr(node, "level", 0)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[:2] != "__":
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in bound:
                yield node.lineno, node.attr


def violations(root: Path) -> list[str]:
    """What is wrong with the imports of our packages under `root`."""
    wrong = []
    for path in sources(root):
        where = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        found = list(imports_of(tree, ".".join(where.parts[:-1])))

        package = where.parts[0]
        barred = {"tests", *PACKAGES} - {package, *PACKAGES[package]}
        wrong += [
            f"{where}:{imported.line}: {package} may not import {top(imported)}"
            for imported in found
            if top(imported) in barred
        ]
        if package != "ab_jax":
            wrong += [
                f"{where}:{line}: {name} is private to another module"
                for line, name in private_names(tree, found)
            ]
            continue

        room = where.parts[1].removesuffix(".py")
        if room not in ROOMS:
            wrong.append(f"{where}: no such room; the order of the house does not know it")
            continue
        for imported in found:
            line = f"{where}:{imported.line}"
            if top(imported) == "ab_jax":
                target = room_of(imported)
                if ORDER.index(target) > ORDER.index(room):
                    wrong.append(f"{line}: {room} imports {target}, which is below it")
            elif top(imported) not in sys.stdlib_module_names | ROOMS[room] | barred:
                wrong.append(f"{line}: {room} may not load {top(imported)}")
    return wrong


def top(imported: Import) -> str:
    return imported.module.split(".")[0]


def sources(root: Path) -> list[Path]:
    return sorted(path for package in PACKAGES for path in root.glob(f"{package}/**/*.py"))


# The checker, on made-up trees


def write_tree(root: Path, path: str, source: str) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    return root


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("ab_jax/quantizers.py", "from ab_jax.blend import Rules", "quantizers imports blend"),
        ("ab_jax/quantizers.py", "from ab_jax import blend", "quantizers imports blend"),
        ("ab_jax/quantizers.py", "from . import schedules", "quantizers imports schedules"),
        ("ab_jax/quantizers.py", "from .blend import Rules", "quantizers imports blend"),
        ("ab_jax/blend.py", "import ab_jax as ab", "blend imports __init__"),
        (
            "ab_jax/blend.py",
            "def f():\n    from ab_jax.models import x",
            "blend.py:2: blend imports",
        ),
        ("ab_jax/blend.py", "import importlib\nimportlib.import_module('flax.core')", "load flax"),
        ("ab_jax/blend.py", "try:\n    import flax\nexcept ImportError: pass", "may not load flax"),
        ("ab_jax/quantizers.py", "import optax", "quantizers may not load optax"),
        (
            "ab_jax/__init__.py",
            "from ab_jax.activations import sign",
            "__init__ imports activations",
        ),
        ("ab_jax/models/resnet.py", "from ..data import load", "models imports data"),
        ("ab_jax/models/resnet.py", "import ab_jax.training.loop", "models imports training"),
        ("ab_jax/training/loop.py", "from ab_jax.export import pack", "training imports export"),
        ("ab_jax/training/loop.py", "import matplotlib.pyplot as plt", "may not load matplotlib"),
        ("ab_jax/data/load.py", "import tensorflow as tf", "data may not load tensorflow"),
        ("ab_jax/data/load.py", "from experiments import a", "ab_jax may not import experiments"),
        ("ab_jax/data/load.py", "import benchmarks.step", "ab_jax may not import benchmarks"),
        ("ab_jax/data/load.py", "import tests.conftest", "ab_jax may not import tests"),
        ("ab_jax/extras.py", "", "no such room"),
        ("experiments/a.py", "from experiments.b import _run", "_run is private"),
        ("experiments/a.py", "from experiments import b\nb._run()", "a.py:2: _run is private"),
        ("experiments/a.py", "import experiments.b\nexperiments.b._run()", "_run is private"),
        ("experiments/a.py", "from . import b as c\nc._run()", "_run is private"),
        ("experiments/a.py", "import ab_jax as ab\nab.blend._match()", "_match is private"),
        ("experiments/a.py", "import tests.conftest", "experiments may not import tests"),
        ("experiments/a.py", "from benchmarks import b", "experiments may not import benchmarks"),
        ("experiments/a.py", "from examples import b", "experiments may not import examples"),
        ("benchmarks/a.py", "from examples import b", "benchmarks may not import examples"),
        ("examples/a.py", "from benchmarks import b", "examples may not import benchmarks"),
        ("benchmarks/a.py", "from tests import b", "benchmarks may not import tests"),
        ("benchmarks/a.py", "from benchmarks.b import _run", "_run is private"),
        ("benchmarks/a.py", "import experiments.b\nexperiments.b._run()", "_run is private"),
    ],
)
def test_checker_finds_a_bad_import(tmp_path: Path, path: str, source: str, message: str) -> None:
    (wrong,) = violations(write_tree(tmp_path, path, source))
    assert message in wrong
    assert wrong.startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ab_jax/quantizers.py", "import dataclasses\nimport jax.numpy as jnp\nimport numpy as np"),
        ("ab_jax/schedules.py", "import optax"),
        ("ab_jax/estimators.py", "from ab_jax.quantizers import Uniform"),
        ("ab_jax/blend.py", "from . import estimators, quantizers"),
        ("ab_jax/__init__.py", "from ab_jax.blend import Rules\nfrom .schedules import cubic_ramp"),
        ("ab_jax/linen.py", "import ab_jax as ab\nimport flax.linen as nn"),
        ("ab_jax/data/load.py", "from ab_jax.data import pixels\nfrom . import sources"),
        ("ab_jax/training/state.py", "from ab_jax import Rules\nfrom ..data.load import load"),
        ("ab_jax/export/pack.py", "from ab_jax.models.resnet import ResNet"),
        (
            "experiments/a.py",
            "import pandas\nfrom experiments import b\nb.run()\nself._x = b.__doc__",
        ),
        ("benchmarks/a.py", "import ab_jax as ab\nfrom experiments import b\nfrom . import c"),
    ],
)
def test_checker_lets_a_good_import_pass(tmp_path: Path, path: str, source: str) -> None:
    assert violations(write_tree(tmp_path, path, source)) == []


# The real tree


def test_imports_follow_the_order_of_the_house() -> None:
    assert violations(ROOT) == []


def test_every_room_that_is_checked_stands() -> None:
    """The check above would pass on an empty folder."""
    walked = {path.relative_to(ROOT).as_posix() for path in sources(ROOT)}
    core = {f"ab_jax/{room}.py" for room in ORDER[: ORDER.index("activations")]}
    assert core <= walked
    assert {"examples/quickstart.py", "benchmarks/measuring/ratios.py"} <= walked


def overfull(path: Path) -> str | None:
    """What speaks against a file's holding one concept."""
    source = path.read_text(encoding="utf-8")
    definitions = ast.FunctionDef | ast.ClassDef
    found = [node for node in ast.parse(source).body if isinstance(node, definitions)]
    public = [node.name for node in found if not node.name.startswith("_")]
    lines = len(source.splitlines())
    if len(public) > MAX_PUBLIC or lines > MAX_LINES:
        return f"{path}: {len(public)} public names, {lines} lines: split it by concept"
    if path.name in BANNED_NAMES:
        return f"{path}: name the file by what it holds"
    return None


def test_a_file_holds_one_concept(tmp_path: Path) -> None:
    assert [wrong for path in sources(ROOT) if (wrong := overfull(path))] == []
    for name, source in {
        "names.py": "".join(f"def f{i}(): ...\n" for i in range(MAX_PUBLIC + 1)),
        "lines.py": "x = 1\n" * (MAX_LINES + 1),
        "utils.py": "",
    }.items():
        assert overfull(write_tree(tmp_path, name, source) / name), name
    private = "".join(f"def _f{i}(): ...\n" for i in range(MAX_PUBLIC + 1))
    assert not overfull(write_tree(tmp_path, "private.py", private) / "private.py")


def same_names(root: Path) -> dict[str, list[str]]:
    """Names that several Python files have, but for those that Python and pytest ask for."""
    found: dict[str, list[str]] = {}
    for path in [*sources(root), *sorted(root.glob("tests/**/*.py"))]:
        if path.name not in ("__init__.py", "conftest.py"):
            found.setdefault(path.name, []).append(path.relative_to(root).as_posix())
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_no_two_files_have_one_name(tmp_path: Path) -> None:
    assert same_names(ROOT) == {}
    for path in ("ab_jax/__init__.py", "ab_jax/a/__init__.py", "ab_jax/b.py", "experiments/b.py"):
        write_tree(tmp_path, path, "")
    assert same_names(tmp_path) == {"b.py": ["ab_jax/b.py", "experiments/b.py"]}


def test_each_file_that_lies_directly_in_these_rooms_is_a_command() -> None:
    rooms = [*ROOT.glob("experiments/[a-z]*.py"), *ROOT.glob("benchmarks/[a-z]*.py")]
    assert len(rooms) > 15
    for path in rooms:
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8"), path


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {
        *("flax", "tensorflow", "tensorflow_datasets", "grain", "orbax", "array_record"),
        *("rich", "tyro", "tensorboardX", "matplotlib", "sklearn", "PIL", "h5py", "safetensors"),
    }
    command = f"import ab_jax, sys; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_importing_the_package_takes_less_than_a_second_beyond_jax() -> None:
    """In the processor's time, which does not depend on what else the machine does."""
    clock = "time.process_time()"
    command = f"import jax, time; start = {clock}; import ab_jax; print({clock} - start)"
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 1
