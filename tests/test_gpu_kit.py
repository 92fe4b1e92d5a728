"""The kit for a GPU host without network, with a stand-in for training: what goes, what returns.

That it trains can only be seen on such a host, or in a rehearsal: an empty folder, the bundle and a
bare Python (the toy in `gpu/run.sh`).
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments.settings.build import settled
from experiments.settings.config import Config, recorded

ROOT = Path(__file__).parents[1]
KIT = ROOT / "gpu"
# What the head of bundle.sh says that the host has.
ON_THE_HOST = (
    *("jax", "numpy", "scipy", "opencv-python-headless", "pillow", "scikit-learn", "matplotlib"),
    *("rich", "h5py", "pyarrow", "tensorstore", "protobuf", "psutil", "msgpack"),
)
LEFT_OUT = {"uvloop"}


# What travels


def with_their_needs(requirements: list[Requirement]) -> set[str]:
    """The distributions that pip installs for these under Python 3.12, as they are here."""
    seen: set[tuple[str, str]] = set()
    waiting = [(r, extra) for r in requirements for extra in ("", *r.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # on the host alone
            continue
        python = {"python_version": "3.12", "python_full_version": "3.12.0", "extra": extra}
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate(python):
                waiting += [(need, of) for of in ("", *need.extras)]
    return {name for name, _ in seen}


def test_the_bundle_has_what_training_needs_and_the_host_lacks() -> None:
    script = (KIT / "bundle.sh").read_text()
    listed = re.search(r"^packages=\((.*?)\)", script, re.DOTALL | re.MULTILINE)
    owners = re.search(r"^with_their_own=\((.*?)\)", script, re.MULTILINE)
    assert listed is not None
    assert owners is not None
    travel = {*map(canonicalize_name, listed[1].split()), "promise"}
    travel |= with_their_needs([Requirement(name) for name in owners[1].split()])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in (li.partition("#")[0] for li in lines) if line.strip()]
    there = with_their_needs([Requirement(name) for name in ON_THE_HOST])
    assert with_their_needs(wanted) - there - LEFT_OUT <= travel
    # What is on the host would travel in vain, and perhaps not fit what the host has.
    assert not travel & there


def test_checkpoints_do_without_what_is_left_out() -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in LEFT_OUT)
    code = f"import sys; {blocked}; import ab_jax.training.checkpoint"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# What returns


def machine(path: Path) -> Path:
    """A fresh host with the clone's files and the bundle, whose training is a stand-in."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "experiments", path / "experiments", ignore=ignore)
    fakes = ROOT / "tests/experiments"
    shutil.copyfile(fakes / "fake_training.py", path / "experiments/train.py")
    shutil.copyfile(fakes / "fake_together.py", path / "experiments/together.py")
    shutil.copytree(KIT, path / "gpu", ignore=ignore)
    shutil.copytree(ROOT / "studies", path / "studies")
    (path / "defaults.json").write_text(json.dumps(recorded(settled(Config()))))
    (path / "ab_jax").symlink_to(ROOT / "ab_jax")
    for folder in (".gpu", "bin"):
        (path / folder).mkdir()
    shutil.copyfile(KIT / "run.sh", path / ".gpu/run.sh")
    (path / ".gpu/revision").write_text("of the bundle")
    with tarfile.open(path / ".gpu/packages.tar.xz", "w:xz") as archive:
        archive.add(KIT / "run.sh", "a_package.py")
    python = path / "bin/python3"
    no_data = 'case "$*" in *ab_jax.data.prepare*) exit 0;; esac'
    python.write_text(f'#!/bin/sh\n{no_data}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return path


def run(host: Path, **told: str) -> subprocess.CompletedProcess[str]:
    places = {"SITE": str(host / "site"), "OUT": str(host / "out")}
    path = f"{host}/bin:{os.environ['PATH']}"
    toy = {"JAX_PLATFORMS": "cpu", "NAME": "toy", "CHANGES": "epochs=2.0 width=0.03"}
    env = {**os.environ, "PATH": path} | toy | places | told
    command = ["bash", ".gpu/run.sh"]
    return subprocess.run(command, cwd=host, env=env, capture_output=True, text=True)


def returned(host: Path) -> set[str]:
    """The files in the archive, below the study's folder of results."""
    with tarfile.open(host / "out/toy.tar.gz") as archive:
        files = {Path(member.name) for member in archive if member.isfile()}
    files.remove(Path("studies/toy.toml"))
    return {path.relative_to("results/toy").as_posix() for path in files}


RATES = {"ste": (0.1, 0.2, 0.4), "ab": (0.2, 0.4, 0.8), "parq": (0.1, 0.2, 0.4)}
TRIALS = {
    f"trials/{method}_lr{rate}_seed{seed}.json"
    for method in RATES
    for rate in RATES[method]
    for seed in (100, 101)
}
STARTS_OF_TRIALS = {"start/seed100.json", "start/seed101.json"}


def seed(number: int) -> set[str]:
    finals = {f"final/{method}_seed{number}.json" for method in RATES}
    return {f"start/seed{number}.json", *finals}


@pytest.mark.long
def test_whole_seeds_return_and_are_not_trained_again(tmp_path: Path) -> None:
    first = machine(tmp_path / "first")
    done = run(first, SEEDS="0..1", FAKE="fail=1 method=parq")
    assert done.returncode == 75, done.stdout + done.stderr
    assert "not whole: seed 1" in done.stdout
    assert (first / "runs/toy/final/ab_seed1/record.json").exists()
    assert returned(first) == {*TRIALS, *STARTS_OF_TRIALS, *seed(0)}
    record = json.loads((first / "results/toy/final/ste_seed0.json").read_text())
    wanted = {"learning_rate": 0.1, "epochs": 2.0, "batch_size": 512, "read_test": True}
    wanted |= {"width": 0.03, "dtype": "bfloat16"}
    assert {flag: record["config"][flag] for flag in wanted} == wanted

    fresh = machine(tmp_path / "fresh")
    with tarfile.open(first / "out/toy.tar.gz") as archive:
        archive.extractall(fresh, filter="data")
    late = run(fresh, MINUTES="0")
    assert late.returncode == 75, late.stdout + late.stderr
    assert returned(fresh) == returned(first)

    done = run(fresh, SEEDS="0,1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert returned(fresh) == returned(first) | seed(1)
    trained = {path.parent.name for path in (fresh / "runs/toy").rglob("log.txt")}
    assert trained == {"seed1", "ste_seed1", "ab_seed1", "parq_seed1"}


@pytest.mark.long
def test_runs_from_scratch_return_one_by_one(tmp_path: Path) -> None:
    host = machine(tmp_path / "host")
    told = {"STUDY": "resnet20_full_size", "SEEDS": "0..1", "TOGETHER": "2"}
    done = run(host, FAKE="fail=1 method=ab", **told)
    assert done.returncode == 75, done.stdout + done.stderr
    kinds = {f"{w}_{m}" for w in ("binary", "ternary") for m in ("ste", "soft_ste", "ab", "parq")}
    runs = {f"final/{kind}_seed{seed}.json" for kind in kinds | {"binary_float"} for seed in (0, 1)}
    failed = {"final/binary_ab_seed1.json", "final/ternary_ab_seed1.json"}
    assert returned(host) == runs - failed


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"SEEDS": "0,77"}, "error: --seeds=0,77: studies/toy.toml has no seed 77"),
        ({"NAME": "digits"}, "error: there is a study digits"),
        ({"STUDY": "binarynet_full_size", "NAME": "binarynet_full_size"}, "error: there is a"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, told: dict[str, str], message: str) -> None:
    host = machine(tmp_path / "host")
    before = {path.name: path.read_text() for path in (host / "studies").glob("*.toml")}
    done = run(host, **told)
    assert done.returncode not in (0, 75)
    assert message in done.stderr
    after = {path.name: path.read_text() for path in (host / "studies").glob("*.toml")}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("script", ["bundle.sh", "run.sh"])
def test_the_scripts_ask_for_what_they_need(script: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OUT"}
    done = subprocess.run(["bash", KIT / script], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert {"bundle.sh": "cifar10_jpeg --source", "run.sh": "a directory"}[script] in done.stderr
