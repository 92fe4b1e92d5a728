"""What `pip install` brings: the library alone, with jax and optax and nothing else.

The wheel is built from a copy of the tree by the backend at hand, without network.
"""

import email
import email.message
import os
import re
import shutil
import subprocess
import sys
import tarfile
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
    "export": "requirements-export.txt",
    "qwix": "requirements-qwix.txt",
    "onnx": "requirements-onnx.txt",
    "litert": "requirements-litert.txt",
    "pretrained": "requirements-pretrained.txt",
    "slurm": "requirements-slurm.txt",
    "peers": "requirements-peers.txt",
    "torch": "requirements-torch.txt",
}
INPUTS = ("pyproject.toml", *EXTRAS.values(), "README.md", "LICENSE")


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {requirement.name: requirement for requirement in found}


def build(kind: str, source: Path) -> Path:
    """The wheel or sdist that the build backend makes of a tree."""
    code = f"from setuptools.build_meta import build_{kind}; print(build_{kind}('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True
    )
    return source / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, with the folders that must stay out of a wheel as well."""
    source = tmp_path_factory.mktemp("source")
    for name in INPUTS:
        shutil.copy(ROOT / name, source)
    for name in ("ab_jax", "benchmarks", "examples", "experiments", "tests", "results"):
        if (ROOT / name).exists():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(build("wheel", source)) as archive:
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


def test_what_is_installed_stands_alone(source: Path, wheel: zipfile.ZipFile) -> None:
    """Installed from the wheel, away from this tree, the library is imported and blends."""
    site = source / "site"
    wheel.extractall(site)
    code = """
import ab_jax as ab, jax.numpy as jnp
rules = ab.Rules([("kernel", ab.Binary())])
print(ab.__file__, ab.blend({"kernel": jnp.asarray([[1.0], [-3.0]])}, rules, 1.0)["kernel"].ravel())
"""
    alone = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=alone, cwd=site, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(site / "ab_jax/__init__.py"), "[", "2.", "-2.]"], done.stderr


def test_sdist_makes_the_same_wheel(source: Path, wheel: zipfile.ZipFile) -> None:
    with tarfile.open(build("sdist", source)) as archive:
        archive.extractall(source / "unpacked", filter="data")
    (tree,) = (source / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", tree)) as again:
        one, other = ({i.filename: i.CRC for i in w.infolist()} for w in (wheel, again))
    assert one == other


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
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+),? ", changelog, re.MULTILINE)[0].strip(",") == metadata["Version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
