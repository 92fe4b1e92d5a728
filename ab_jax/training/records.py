"""What a run leaves behind: its configuration, its metrics and, once complete, its record.

    runs/NAME/config.json     every flag, the git revision, package versions, hardware
    runs/NAME/metrics.jsonl   a line for each evaluation (TensorBoard events lie beside it)
    runs/NAME/record.json     all of it and the final readings, when the run is complete

A record worth keeping is copied to `results/`, where tables are made from it.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunDirectory:
    """The directory of one run. A context manager that closes its files.

    Args:
      path: created when missing.
      experiment: the module that runs, for the record.
      config: every flag of the run, JSON values.

    Raises:
      FileExistsError: the run is complete already. ValueError: it was begun with other flags.
    """

    def __init__(self, path: Path, *, experiment: str, config: Mapping[str, Any]) -> None:
        self.path = path
        if (path / "record.json").exists():
            raise FileExistsError(
                f"The run {path} is complete. Choose another --name, or remove that directory to "
                f"run it anew."
            )
        path.mkdir(parents=True, exist_ok=True)
        self._metrics_path = path / "metrics.jsonl"
        described = describe_run(experiment, config)
        config_path = path / "config.json"
        # A run that stopped before its first evaluation, over a mistyped flag say, left nothing to
        # resume: it may start anew with any flags.
        if config_path.exists() and self.metrics:
            self._described = json.loads(config_path.read_text())
            _check_same_flags(path, self._described["config"], described["config"])
        else:
            self._described = described
            write_json(config_path, described)
        self._events = SummaryWriter(str(path), write_to_disk=True)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines written so far."""
        if not self._metrics_path.exists():
            return []
        return [json.loads(line) for line in self._metrics_path.read_text().splitlines()]

    def write_metrics(self, line: Mapping[str, Any]) -> None:
        """Append the metrics of one evaluation; `step` must be among them."""
        with self._metrics_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._events.add_scalar(name, value, line["step"])
        self._events.flush()

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after a checkpoint, which a resumed run computes again."""
        kept = [line for line in self.metrics if line["step"] <= step]
        _write_text(self._metrics_path, "".join(json.dumps(line) + "\n" for line in kept))

    def complete(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write and return the record of the whole run."""
        metrics = self.metrics
        record = {**self._described, "metrics": metrics, "summary": dict(summary)}
        write_json(self.path / "record.json", record)
        return record


def describe_run(experiment: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What can be said of a run before it starts."""
    return {
        "experiment": experiment,
        "config": json.loads(json.dumps(dict(config))),
        "revision": _git_revision(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "hardware": _hardware(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all.

    Raises:
      ValueError: a number that is not finite, which JSON does not have.
    """
    _write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _check_same_flags(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if differing:
        flags = ", ".join(f"--{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differing)
        raise ValueError(
            f"The run {path} was begun with other flags: {flags}. Give the same flags to resume "
            f"it, or choose another --name."
        )


def _git_revision() -> str | None:
    """The commit of the code that runs, marked when files differ from it; None outside git."""
    here = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if status else "")


def _hardware() -> str:
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = next(
            (
                line.partition(":")[2].strip()
                for line in _lines(Path("/proc/cpuinfo"))
                if line.startswith("model name")
            ),
            platform.processor() or platform.machine(),
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"{name}, {cores} of {os.cpu_count()} cores"
    return f"{name}; {jax.device_count()} {device.platform} device(s)"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
