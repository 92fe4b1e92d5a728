"""What `pip install` brings: the library alone, with jax and optax and nothing else.

The wheel is built from a copy of the tree by the backend at hand, without network.
"""

import email
import email.message
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ab_jax

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "train": "requirements.txt",
    "test": "requirements-test.txt",
    "qwix": "requirements-qwix.txt",
    "onnx": "requirements-onnx.txt",
    "litert": "requirements-litert.txt",
    "peers": "requirements-peers.txt",
    "torch": "requirements-torch.txt",
}
INPUTS = ("pyproject.toml", *EXTRAS.values(), "README.md", "LICENSE")


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {requirement.name: requirement for requirement in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel built from this tree; folders that must stay out of it are copied as well."""
    source = tmp_path_factory.mktemp("source")
    for name in INPUTS:
        shutil.copy(ROOT / name, source)
    for name in ("ab_jax", "experiments", "tests", "results"):
        if (ROOT / name).exists():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
    subprocess.run(
        [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (path,) = source.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ab_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == on_disk
    assert {"ab_jax/__init__.py", "ab_jax/py.typed"} <= packed


def test_wheel_carries_the_license(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_core_needs_jax_and_optax_alone(metadata: email.message.Message) -> None:
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    core = {r.name: r.specifier for r in required if r.marker is None}
    listed = requirements("requirements.txt")
    assert core == {name: listed[name].specifier for name in ("jax", "optax")}


@pytest.mark.parametrize(("extra", "name"), EXTRAS.items())
def test_extra_is_its_requirements_file(
    metadata: email.message.Message, extra: str, name: str
) -> None:
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    marked = {
        r.name: r.specifier for r in required if r.marker and r.marker.evaluate({"extra": extra})
    }
    assert marked == {n: r.specifier for n, r in requirements(name).items()}


@pytest.mark.parametrize("file", [file for extra, file in EXTRAS.items() if extra != "test"])
def test_every_requirement_is_a_range(file: str) -> None:
    """A lower bound that was tested, an upper bound against the next break."""
    for name, requirement in requirements(file).items():
        operators = sorted(specifier.operator for specifier in requirement.specifier)
        assert operators == ["<", ">="], name


# PyTorch has an environment of its own (make test-torch).
@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"train", "test", "torch"}))
def test_the_tests_install_what_exports_need(extra: str) -> None:
    installed = {**requirements(EXTRAS["train"]), **requirements(EXTRAS["test"])}
    for name, requirement in requirements(EXTRAS[extra]).items():
        assert requirement == installed[name]


def test_version_and_python_come_from_one_place(metadata: email.message.Message) -> None:
    assert metadata["Version"] == ab_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", ab_jax.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
