"""What a run leaves behind: its configuration, its metrics and, once complete, its record.

    runs/NAME/config.json     every flag, the git revision, package versions, hardware
    runs/NAME/metrics.jsonl   a line for each evaluation (TensorBoard events lie beside it)
    runs/NAME/record.json     all of it and the final readings, when the run is complete
    runs/NAME/lock            held as long as a process runs there

A record worth keeping is copied to `results/`, where tables are made from it.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ab_jax.files import append_line, read_lines, write_whole, writing

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunDirectory:
    """The directory of one run, which only one process writes into at a time.

    A context manager that closes its files and gives the directory free.

    Args:
      path: created when missing.
      experiment: the module that runs, for the record.
      config: every flag of the run, JSON values.
      data: what is known of the data set, as JSON values: its version above all.
      free: flags that cannot change a result, in which a resumed run may differ.
      allow_changed: whether other flags and data may differ too. The record tells of it.
      writes: whether this process writes; of several that train together the first one does.

    Raises:
      FileExistsError: the run is complete already. BlockingIOError: another process runs there.
      ValueError: it was begun with other flags or on other data; names each. OSError: the directory
        cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        experiment: str,
        config: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        free: Collection[str] = (),
        allow_changed: bool = False,
        writes: bool = True,
    ) -> None:
        self.path = path
        self._writes = writes
        if (path / "record.json").exists():
            raise FileExistsError(
                f"The run {path} is complete. Choose another --name, or remove that directory to "
                f"run it anew."
            )
        if writes:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path) if writes else None
        self._metrics_path = path / "metrics.jsonl"
        self._config_path = path / "config.json"
        self._described = describe_run(experiment, config, data)
        self._changed: list[dict[str, Any]] = []
        try:
            # A run that stopped before its first checkpoint, over a mistyped flag say, left nothing
            # to resume: it may start anew with any flags.
            if self._config_path.exists() and (self.metrics or _has_checkpoints(path)):
                now, self._described = self._described, json.loads(self._config_path.read_text())
                self._changed = _changes(self._described, now, free)
                if self._changed and not allow_changed:
                    raise ValueError(_refusal(path, self._changed))
                for change in self._changed:
                    self._described[change["of"]][change["name"]] = change["is"]
            elif writes:
                write_json(self._config_path, self._described)
            if writes:
                with writing(path):
                    self._events = EventsWriter(str(path / "events"))
        except BaseException:
            self._give_free()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            with contextlib.suppress(OSError):  # of a full disk, which has been told of already
                self._events.close()
        self._give_free()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines written so far; of one that was cut off, nothing."""
        lines = []
        for number, line in enumerate(read_lines(self._metrics_path), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self._metrics_path} is damaged in line {number}: {error}. Put the right "
                    f"line back, or remove {self.path} to begin anew."
                ) from None
        return lines

    def write_metrics(self, line: Mapping[str, Any]) -> None:
        """Append the metrics of one evaluation; `step` must be among them.

        Raises:
          OSError: it cannot be written, the disk being full, say; names the file and the fix.
        """
        if not self._writes:
            return
        append_line(self._metrics_path, json.dumps(line))
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step"
        ]
        self._write_event(Event(step=line["step"], summary=Summary(value=values)))

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after a checkpoint, which a resumed run computes again."""
        if not self._writes:
            return
        kept = [line for line in self.metrics if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self._metrics_path, text.encode())
        if step:  # TensorBoard then drops what it has of the steps from here on
            start = SessionLog(status=SessionLog.START)
            self._write_event(Event(step=step + 1, session_log=start))
        if self._changed:
            changed = [{"after_step": step, **change} for change in self._changed]
            self._described["changed"] = [*self._described.get("changed", []), *changed]
            write_json(self._config_path, self._described)

    def complete(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write and return the record of the whole run."""
        metrics = self.metrics
        record = {**self._described, "metrics": metrics, "summary": dict(summary)}
        if self._writes:
            write_json(self.path / "record.json", record)
        return record

    def _give_free(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _write_event(self, event: Event) -> None:
        event.wall_time = time.time()
        # By the writer behind tensorboardX's `SummaryWriter`, whose thread a full disk would end
        # without a word, and then block whoever goes on to write.
        with writing(self.path):
            self._events.write_event(event)
            self._events.flush()


def describe_run(
    experiment: str, config: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What can be said of a run before it starts."""
    return {
        "experiment": experiment,
        "config": json.loads(json.dumps(dict(config))),
        **({} if data is None else {"data": json.loads(json.dumps(dict(data)))}),
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
      OSError: it cannot be written; names the file and the fix.
    """
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _lock(path: Path) -> int:
    """Take the directory for this process, until it closes what is returned or ends in any way."""
    with writing(path):
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
        os.close(lock)
        raise BlockingIOError(
            f"The run {path} is in use by another process{f' ({holder})' if holder else ''}. Wait "
            f"for it or end it, or choose another --name."
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: {path} cannot be locked ({error.strerror}): run one process there alone.")
    with writing(path):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    return lock


def _has_checkpoints(path: Path) -> bool:
    return any((path / "checkpoints").glob("[0-9]*"))


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]
) -> list[dict[str, Any]]:
    """Each flag, and each fact of the data, in which a run differs from what it was begun with.

    A fact that the code did not note yet when the run was begun tells nothing.
    """
    changes = []
    for of in ("config", "data"):
        if of in before and of in now:
            was, is_ = before[of], now[of]
            names = {*was, *is_}.difference(free) if of == "config" else was
            for name in sorted(names):
                if was.get(name) != is_.get(name):
                    change = {"of": of, "name": name, "was": was.get(name), "is": is_.get(name)}
                    changes.append(change)
    return changes


def _refusal(path: Path, changes: list[dict[str, Any]]) -> str:
    prefix = {"config": "--", "data": "data "}
    told = [  # of a thousand names of classes, the first ones
        f"{prefix[c['of']]}{c['name']} was {c['was']!r:.200}, is {c['is']!r:.200}" for c in changes
    ]
    if any(c["of"] == "config" for c in changes):
        what, fix = "with other flags", "Give the same flags"
    else:
        what, fix = "on other data", "Give the --data_dir of that data"
    return (
        f"The run {path} was begun {what}: {', '.join(told)}. {fix} to resume it, choose another "
        f"--name, or go on with the change by --allow_changed."
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
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{name}; {jax.device_count()} {device.platform} device(s){processes}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
