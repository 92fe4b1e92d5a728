"""How a command ends: the line that names the error is the last one, whatever is left behind."""

import contextlib
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from ab_jax.training.checkpoint import Checkpoints
from ab_jax.training.state import TrainState
from experiments.settings.command_line import end_with_a_line

ROOT = Path(__file__).parents[2]

# When the process ends and drops them: asyncio logs that a task failed and nobody asked, and Python
# warns of one that was never begun.
LEFT_BEHIND = """
import asyncio, atexit
from experiments.settings.command_line import end_with_a_line

async def fail():
    raise ValueError("in the background")

def run():
    global task, unawaited
    loop = asyncio.new_event_loop()
    task = loop.create_task(fail())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    unawaited = fail()
    raise OSError("the disk is full")

atexit.register(lambda: [globals().pop(name) for name in ("task", "unawaited")])
end_with_a_line(run)
"""


def test_nothing_is_said_after_the_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: the disk is full\n"


# An exception that a handler raises while a destructor runs, or an import whose errors are caught,
# is swallowed there.
SWALLOWS = """
import os, signal, sys
from experiments.settings.command_line import end_with_a_line

class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def run():
    print("begun")
    Destroyed()
    print("went on")

end_with_a_line(run)
"""


def test_sigterm_with_nothing_to_save_ends_it_whatever_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 75
    assert done.stdout == "begun\n"
    assert done.stderr.startswith("stopped by SIGTERM with nothing to save")


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Within it no file may grow beyond some bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def logging_enabled() -> Iterator[None]:
    """`end_with_a_line` disables it for good, since the process ends."""
    logging.disable(logging.NOTSET)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("logging_enabled")
def test_a_write_that_fails_in_the_background_is_told_of_by_the_line_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = TrainState(
        step=jnp.int32(3),
        params={"kernel": jnp.arange(10_000.0)},
        model_state={},
        opt_state=(),
        key=jnp.zeros(2, jnp.uint32),
    )

    def run() -> None:
        with small_files(), Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(state)

    with pytest.raises(SystemExit, match="error: The checkpoint of step 3 could not be written"):
        end_with_a_line(run)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_what_the_parser_refuses_names_a_command_that_works() -> None:
    command = [sys.executable, "-m", "experiments.resnet20_cifar10", "--lr=0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "python -m experiments.resnet20_cifar10 --help" in " ".join(done.stderr.split())
