"""The page on additions, followed to the letter: its files, its commands, its table."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import train
from experiments.settings.config import Config, FlagError
from tests.fast_compilation import FAST_COMPILATION

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files."""
    path = tmp_path_factory.mktemp("extending")
    assert sorted(FILES) == ["my_data.py", "my_method.py", "my_network.py"]
    for name, text in FILES.items():
        (path / name).write_text(text)
    return path


@pytest.mark.long
def test_one_of_each_trains_and_stands_in_the_report(directory: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(directory)}
    environment["XLA_FLAGS"] = FAST_COMPILATION
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert len(commands) == 4
    for command in commands:
        python, *words = shlex.split(command)
        assert python == "python"
        done = subprocess.run(
            [sys.executable, *words], cwd=directory, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    table = (directory / "runs/mine/table.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert {"half_factor", "STE"} <= {*rows}
    assert (directory / "net.safetensors").stat().st_size > 1_000


BROKEN = """
import flax.linen as nn

class NoClasses(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(3)(images.reshape(images.shape[0], -1))

class NoTrain(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.reshape(images.shape[0], -1))

class Map(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(self.num_classes)(images)

class Norm(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train)(images.reshape(images.shape[0], -1))
        return nn.Dense(self.num_classes)(x)

class Fine(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(self.num_classes)(images.reshape(images.shape[0], -1))

def no_module(num_classes):
    return lambda images: images

NUMBER = 3

def no_dataset(**flags):
    return [1, 2, 3]
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"network": "broken:NoClasses"}, "takes no num_classes"),
        ({"network": "broken:NoTrain"}, "cannot be called on images of shape"),
        ({"network": "broken:Map"}, r"two images give shape \(2, 8, 8, 10\), not logits"),
        ({"network": "broken:Norm"}, "it has batch_stats, but no field batch_stats_momentum"),
        ({"network": "broken:no_module"}, "makes a function; it must make a flax.linen.Module"),
        ({"network": "broken:NUMBER"}, "is 3: it should be a Linen module's class"),
        ({"network": "broken:nothing"}, "has no attribute 'nothing'"),
        ({"network": "no_such_module:X"}, "there is no module 'no_such_module'"),
        ({"network": "broken:Fine", "width": 0.5}, "does not take --width=0.5: omit it"),
        (
            {"network": "broken:Fine", "norm_dtype": "float32"},
            "does not take --norm_dtype=float32: omit it",
        ),
        ({"network": "broken:Fine", "act_bits": 4}, "4 does not fit.*'stem' matches no layer"),
        ({"method": "broken:NUMBER"}, "is 3: it should be an estimator"),
        ({"dataset": "broken:NUMBER"}, "is 3: it should be a function"),
        ({"dataset": "broken:no_dataset"}, "returned a list, not an ab_jax.data.Dataset"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_a_broken_contract_is_told_before_anything_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], message: str
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    (flag, value), *_ = flags.items()
    with pytest.raises(FlagError, match=message) as refused:
        train.run(Config(**{"dataset": "digits", **flags}))
    assert f"--{flag}={value}" in str(refused.value)
    assert not (tmp_path / "runs").exists()
