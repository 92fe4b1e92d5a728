"""A folder in which sweeps and studies start `fake_training` instead of training."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.settings.build import settled
from experiments.settings.config import Config, recorded


@dataclasses.dataclass(frozen=True)
class House:
    """`call` is what runs a command in this process, whose own processes are the fake ones."""

    path: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def call(
        self,
        main: Callable[[Sequence[str]], int],
        *words: str,
        fake: str = "",
        stop: tuple[Callable[[], bool], int] | None = None,
    ) -> tuple[int, str]:
        """The command's exit code and all that it printed.

        Args:
          fake: orders for `fake_training`.
          stop: once this holds, this process gets that signal.
        """
        self.monkeypatch.setenv("FAKE", fake)
        self.capfd.readouterr()
        if stop is not None:
            threading.Thread(target=_signal_when, args=stop, daemon=True).start()
        code = main(words)
        said = self.capfd.readouterr()
        return code, said.out + said.err

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / "runs" / name / "record.json").read_text())

    def train(self, *words: str, fake: str = "") -> subprocess.Popen[bytes]:
        """A run that nobody looks after."""
        command = [sys.executable, "-m", "experiments.train", *words, "--runs_dir=runs"]
        return subprocess.Popen(command, cwd=self.path, env={**os.environ, "FAKE": fake})


def _signal_when(condition: Callable[[], bool], number: int) -> None:
    wait_for(condition)
    os.kill(os.getpid(), number)


@pytest.fixture
def house(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[House]:
    """The current directory for a test; runs that are left at its end are killed."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/__init__.py").touch()
    fake = Path(__file__).with_name("fake_training.py")
    shutil.copyfile(fake, tmp_path / "experiments/train.py")
    (tmp_path / "defaults.json").write_text(json.dumps(recorded(settled(Config()))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    # A process in the background may ignore SIGINT, and those it starts would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield House(tmp_path, monkeypatch, capfd)
    signal.signal(signal.SIGINT, before)
    for file in tmp_path.rglob("pid"):
        if alive(file):
            os.kill(int(file.read_text()), signal.SIGKILL)


def alive(pid_file: Path) -> bool:
    """Whether that process runs (one that has ended and waits to be reaped does not)."""
    try:
        status = Path(f"/proc/{pid_file.read_text()}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
