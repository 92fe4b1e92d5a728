"""Kill a real training process at random moments, damage its checkpoints, and compare its end.

    make stress            (or: python -m tests.stress.survive --kills=3 --damages=30)

One run is never interrupted. Others are killed (SIGKILL anywhere, in the middle of a checkpoint's
write, or between its write and its name; now and then SIGTERM) and resumed until they end, and
must then hold the same bits and the same lines of metrics. Checkpoints are damaged by a bit, a cut,
a missing or a foreign file: all of it must be noticed. It prints a table, and exits with 1 if
anything in it is not as it should be. The processes that it starts end with it.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

from ab_jax.training.retention import newest_whole
from tests.fast_compilation import FAST_COMPILATION

ROOT = Path(__file__).parents[2]
# Momentum, accumulation, augmentation, batch statistics, and an evaluation every few steps.
FLAGS = (
    *("--dataset=digits", "--width=0.03125", "--activation=sign", "--watch=conv3/kernel"),
    *("--epochs=2", "--batch_size=64", "--eval_every=0.25", "--warmup=0.5", "--accumulate=3"),
    *("--flip", "--method=ab", "--seed=5"),
)
STEPS = 36
KINDS = {
    "flipped": "bits flipped",
    "truncated": "files truncated",
    "deleted": "files deleted",
    "added": "files added",
}
POLL = 0.002  # seconds
LONGEST = 300  # seconds that one process may take
_TIMED = ("seconds", "evaluation_seconds", "resumed_at")  # what no two runs share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How often, and within which time."""

    kills: int = 24  # by SIGKILL
    stops: int = 6  # by SIGTERM, at least
    damages: int = 400  # to checkpoints at rest
    damaged_runs: int = 4  # resumed from behind a damaged checkpoint
    seed: int | None = None  # of all random choices; None: a fresh one
    minutes: float = 18.0  # after which it gives up


class Processes:
    """Training processes, of which none outlives this one."""

    def __init__(self, directory: Path, deadline: float) -> None:
        self.directory = directory
        self._deadline = deadline
        self._live: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def training(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process that trains or resumes a run; killed when left."""
        if time.monotonic() > self._deadline:
            raise TimeoutError("out of time: allow more --minutes")
        places = (f"--runs_dir={self.directory}", f"--compilation_cache={self.directory / 'cache'}")
        command = [sys.executable, "-m", "experiments.binarynet_cifar10", *FLAGS, *places]
        environment = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "JAX_PLATFORMS": "cpu"}
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*command, f"--name={name}"],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def finish(self, name: str) -> None:
        """Train or resume a run to its end."""
        with self.training(name) as process:
            code = process.wait(LONGEST)
        if code:
            log = self.log(name).read_text()[-2000:]
            raise AssertionError(f"{name} ended with {code}:\n{log}")

    def run(self, name: str) -> Path:
        return self.directory / name

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


# What a run holds


def arrays(run: Path) -> dict[str, bytes]:
    """Every number of the last checkpoint, by path."""
    step = newest_whole(run / "checkpoints")
    found = {}
    for item in ("network", "rest"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(run / "checkpoints" / str(step) / item)
        for path, leaf in jax.tree.leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics but for the speed, which no two runs share."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read]


def readings(run: Path) -> Any:
    summary = json.loads((run / "record.json").read_text())["summary"]
    return {k: v for k, v in summary.items() if k not in _TIMED}


def differences(run: Path, whole: Path) -> list[str]:
    """In which of its parts a run differs from the one that nothing interrupted."""
    parts: dict[str, Callable[[Path], Any]] = {
        "numbers": arrays,
        "lines": lines,
        "readings": readings,
    }
    return [name for name, part in parts.items() if part(run) != part(whole)]


# Kills


def torn(run: Path) -> set[tuple[str, int]]:
    """The checkpoints there that have been begun and do not have their name yet."""
    with contextlib.suppress(FileNotFoundError):
        entries = os.scandir(run / "checkpoints")
        return {(e.name, e.inode()) for e in entries if not e.name.isdecimal()}
    return set()


def trains(run: Path, since: float) -> bool:
    """Whether the process that began then trains by now: it has dropped lines of metrics first."""
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > since


def interrupt(
    processes: Processes, name: str, rng: np.random.Generator, seconds: float, counts: Counter[str]
) -> bool:
    """Start a run or resume it, and end it at a random moment; whether it was done before that."""
    kinds = ["anywhere", "training", "in a write", "in a write", "unnamed", "SIGTERM", "SIGTERM"]
    kind = rng.choice(kinds)
    wait = rng.uniform(0, {"anywhere": seconds, "in a write": 0.1, "unnamed": 0}.get(kind, 2))
    run = processes.run(name)
    left_before, since = torn(run), time.time()

    def due() -> bool:
        if kind == "anywhere":
            return True
        if kind in ("training", "SIGTERM"):
            return trains(run, since)
        begun = {entry for entry, _ in torn(run) - left_before}
        return bool(begun) if kind == "in a write" else any(e.endswith(".writing") for e in begun)

    with processes.training(name) as process:
        while process.poll() is None and not due():
            time.sleep(POLL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        code = process.wait(LONGEST)
    if code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM):  # -SIGTERM: before it listens
        raise AssertionError(
            f"{name} ended with {code}:\n{processes.log(name).read_text()[-2000:]}"
        )
    counts["kills"] += code == -signal.SIGKILL
    counts["in a write"] += code == -signal.SIGKILL and bool(torn(run) - left_before)
    counts["stops"] += code == 75
    ended = (run / "record.json").exists()  # after which a kill has nothing left to cut off
    counts["resumes"] += not ended
    return ended


def kill_and_compare(
    processes: Processes, config: Config, rng: np.random.Generator, seconds: float
) -> Counter[str]:
    counts: Counter[str] = Counter()
    whole = processes.run("whole")
    number = 0

    def enough() -> bool:
        return counts["kills"] >= config.kills and counts["stops"] >= config.stops

    while not enough():
        name = f"killed{number}"
        if not any(
            interrupt(processes, name, rng, seconds, counts) for _ in range(rng.integers(2, 8))
        ):
            processes.finish(name)
        if found := differences(processes.run(name), whole):
            print(f"{name} differs from the run that nothing interrupted: {', '.join(found)}")
        counts["mismatches"] += bool(found)
        counts["runs"] += 1
        number += 1
    return counts


# Damage


def damage(checkpoint: Path, rng: np.random.Generator) -> tuple[str, Callable[[], object]]:
    """Damage a checkpoint; returns what was done, and what undoes it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    file = files[rng.integers(len(files))]
    data = file.read_bytes()
    kind = str(rng.choice(list(KINDS)))
    if not data and kind in ("flipped", "truncated"):
        kind = "deleted"
    if kind == "added":
        extra = file.with_name(f"{file.name}{rng.integers(1000)}")
        extra.write_bytes(data)
        return kind, extra.unlink
    if kind == "deleted":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(data[: rng.integers(len(data))])
    else:
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
    return kind, lambda: file.write_bytes(data)


def damage_at_rest(run: Path, times: int, rng: np.random.Generator) -> Counter[str]:
    """Damage the newest checkpoint again and again, and see whether the one before it is chosen."""
    counts: Counter[str] = Counter()
    path = run / "checkpoints"
    newest = newest_whole(path)
    before = max(int(entry.name) for entry in path.iterdir() if int(entry.name) != newest)
    for _ in range(times):
        kind, undo = damage(path / str(newest), rng)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            chosen = newest_whole(path)
        named = any(f"{path / str(newest)}/" in str(warning.message) for warning in told)
        counts[kind] += 1
        counts[f"{kind}, caught"] += chosen == before and named
        undo()
        assert newest_whole(path) == newest
    return counts


def resume_from_behind_damage(
    processes: Processes, times: int, rng: np.random.Generator
) -> Counter[str]:
    """Whole processes that find their newest checkpoint damaged."""
    counts: Counter[str] = Counter()
    for number in range(times):
        name = f"damaged{number}"
        path = processes.run(name) / "checkpoints"
        target = rng.integers(STEPS)
        sealed: list[int] = []
        with processes.training(name) as process:
            while process.poll() is None and (len(sealed) < 2 or max(sealed) < target):
                time.sleep(POLL)
                names = os.listdir(path) if path.is_dir() else []
                sealed = [int(entry) for entry in names if entry.isdecimal()]
            process.kill()
        if (processes.run(name) / "record.json").exists():
            continue  # it was faster
        kind, _ = damage(path / str(newest_whole(path)), rng)
        processes.finish(name)
        counts["resumes"] += 1
        counts[kind] += 1
        counts[f"{kind}, caught"] += "Damaged checkpoint" in processes.log(name).read_text()
        if found := differences(processes.run(name), processes.run("whole")):
            print(f"{name} differs from the run that nothing interrupted: {', '.join(found)}")
        counts["mismatches"] += bool(found)
    return counts


def main(config: Config) -> int:
    """The command line; returns the exit code."""
    seed = secrets.randbits(32) if config.seed is None else config.seed
    print(f"random choices: --seed={seed}", flush=True)
    rng = np.random.default_rng(seed)
    started = time.monotonic()
    # As an exception, so that what has been started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory() as directory:
        processes = Processes(Path(directory), started + 60 * config.minutes)
        processes.finish("whole")  # compiles
        begun = time.monotonic()
        processes.finish("again")
        seconds = time.monotonic() - begun
        mismatches = bool(differences(processes.run("again"), processes.run("whole")))
        print(f"one run takes {seconds:.1f} s", flush=True)
        kills = kill_and_compare(processes, config, rng, seconds)
        print(f"killed {kills['kills']} times; now for damage", flush=True)
        damages = damage_at_rest(processes.run("whole"), config.damages, rng)
        damages += resume_from_behind_damage(processes, config.damaged_runs, rng)
    rows = {
        "kills (SIGKILL)": kills["kills"],
        "of these in the middle of a checkpoint's write": kills["in a write"],
        "stops (SIGTERM, exit code 75)": kills["stops"],
        "resumes": kills["resumes"] + damages["resumes"],
        "mismatches": mismatches + kills["mismatches"] + damages["mismatches"],
    }
    missed = 0
    for kind, what in KINDS.items():
        done, caught = damages[kind], damages[f"{kind}, caught"]
        missed += done - caught
        rows[what] = f"{done}, caught {caught}"
    print("\n| what | how often |\n| --- | ---: |")
    for what, count in rows.items():
        print(f"| {what} | {count} |")
    compared = 1 + kills["runs"] + damages["resumes"]
    seconds = time.monotonic() - started
    print(f"\n{compared} runs of {STEPS} steps, compared bit for bit; {seconds:.0f} s in all.")
    return int(rows["mismatches"] != 0 or missed != 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__, use_underscores=True)))
