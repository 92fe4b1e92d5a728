"""What a run leaves behind: its configuration, its metrics and, once complete, its record.

    runs/NAME/config.json     every flag, the code's revision, versions, hardware; sealed
    runs/NAME/metrics.jsonl   a line for each evaluation (TensorBoard events lie beside it); sealed
                              by every checkpoint
    runs/NAME/record.json     all of it and the final readings, when the run is complete
    runs/NAME/lock            held as long as a process runs there

A record worth keeping is copied to `results/`, where tables are made from it.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ab_jax import __version__
from ab_jax.files import write_whole, writing
from ab_jax.training.existing_run import changes_between, has_checkpoints, take_lock, told
from ab_jax.training.metrics_file import MetricsFile, Seal
from ab_jax.training.provenance import hardware, revision, settings_of_jax
from ab_jax.training.seals import read_sealed, seal, write_sealed

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
      added: flags that a run begun by older code lacks, with what that code did.
      allow_changed: whether other flags and data may differ too. The record tells of it.
      writes: whether this process writes; of several that train together the first one does.

    Raises:
      FileExistsError: the run is complete already. BlockingIOError: another process runs there.
      ValueError: it was begun with other flags or on other data, names each; or a file there is not
        as it was written. OSError: the directory cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        experiment: str,
        config: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        free: Collection[str] = (),
        added: Mapping[str, Any] | None = None,
        allow_changed: bool = False,
        writes: bool = True,
    ) -> None:
        self.path = path
        self.allow_changed = allow_changed
        self._writes = writes
        if (path / "record.json").exists():
            raise FileExistsError(
                f"The run {path} is complete. Choose another --name, or remove that directory to "
                f"run it anew."
            )
        if writes:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(path / "lock") if writes else None
        self._config_path = path / "config.json"
        self._described = describe_run(experiment, config, data)
        self._changed: list[dict[str, Any]] = []
        try:
            self._metrics = MetricsFile(path / "metrics.jsonl", writes=writes)
            # A run that stopped before its first checkpoint, over a mistyped flag say, left nothing
            # to resume: it may start anew with any flags.
            if self.metrics or has_checkpoints(path):
                now = self._described
                self._config, self._described = _read_config(self._config_path)
                self._changed = changes_between(self._described, now, free, added)
                if self._changed and not allow_changed:
                    raise ValueError(_refusal(path, self._changed))
                if writes:
                    seal(self._config_path)
                for change in self._changed:
                    self._described[change["of"]][change["name"]] = change["is"]
            else:
                self._write_config()
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
        """The lines written so far; of one that was cut off, nothing.

        Raises:
          ValueError: one is not as this process wrote or found it; names it and the way out.
        """
        return self._metrics.read()

    def write_metrics(self, line: Mapping[str, Any]) -> None:
        """Append the metrics of one evaluation; `step` must be among them.

        Raises:
          ValueError: a number that is not finite; names it.
          OSError: it cannot be written, the disk being full, say; names the file and the fix.
        """
        if not self._writes:
            return
        self._metrics.append(line)
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step"
        ]
        self._write_event(Event(step=line["step"], summary=Summary(value=values)))

    def seal(self) -> Seal | None:
        """What the next checkpoint is to hold of the lines up to now; None: another process writes.

        Raises:
          ValueError: a file of the run was changed or removed while it runs; names it.
        """
        if not self._writes:
            return None
        self._check_config()
        return self._metrics.seal()

    def forget_after(self, step: int, sealed: Seal | None = None) -> None:
        """Drop the lines of steps after a checkpoint, which a resumed run computes again.

        Args:
          step: of the checkpoint; 0: there is none.
          sealed: what the checkpoint holds of the lines; None: nothing, being older than seals.

        Raises:
          ValueError: a line up to there is not as it was written; names it and the way out.
        """
        self._metrics.cut_back(step, sealed)
        if not self._writes:
            return
        if step:  # TensorBoard then drops what it has of the steps from here on
            start = SessionLog(status=SessionLog.START)
            self._write_event(Event(step=step + 1, session_log=start))
        if self._changed:
            changed = [{"after_step": step, **change} for change in self._changed]
            self._described["changed"] = [*self._described.get("changed", []), *changed]
            self._write_config()

    def complete(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write and return the record of the whole run.

        Raises:
          ValueError: a file of the run was changed or removed while it ran; names it.
        """
        self._check_config()
        metrics = self.metrics
        record = {**self._described, "metrics": metrics, "summary": dict(summary)}
        if self._writes:
            write_json(self.path / "record.json", record)
        return record

    def _give_free(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _write_config(self) -> None:
        self._config = _to_json(self._described)
        if self._writes:
            write_sealed(self._config_path, self._config)

    def _check_config(self) -> None:
        if self._writes and read_sealed(self._config_path) != self._config:
            raise ValueError(
                f"{self._config_path} was changed or removed while the run goes on. Put it back "
                f"as it was and give the same command again, or remove {self.path} to begin anew."
            )

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
        "revision": revision(),
        # Our own version, too: it says which fits made the scales.
        "packages": {"ab_jax": __version__}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "hardware": hardware(),
        "settings_of_jax": settings_of_jax(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def accuracies_of(run: Path | None) -> dict[str, float] | None:
    """The final accuracies on validation images of another run; None where it has no record."""
    try:
        if run is not None:
            return json.loads((run / "record.json").read_bytes())["summary"]["validation"]
    except (OSError, ValueError, KeyError, TypeError):  # a file of weights, or a run cut off
        pass
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all.

    Raises:
      ValueError: a number that is not finite, which JSON does not have.
      OSError: it cannot be written; names the file and the fix.
    """
    write_whole(path, _to_json(value))


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _read_config(path: Path) -> tuple[bytes, dict[str, Any]]:
    """What a run is, as it was written and as a value.

    Raises:
      ValueError: it is missing or not as it was written; names it and the way out.
    """
    data = read_sealed(path)
    if data is None:
        raise ValueError(
            f"{path} is missing, but there is a run beside it. Put it back, or remove "
            f"{path.parent} to begin anew."
        )
    try:
        described = json.loads(data)
        parts = [described["config"], described.get("data", {})]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("its flags and data must be objects")
        if not isinstance(described.get("changed", []), list):
            raise TypeError("what was changed must be a list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Put the right one back, or remove {path.parent} to begin "
            f"anew."
        ) from None
    return data, described


def _refusal(path: Path, changes: list[dict[str, Any]]) -> str:
    if any(c["of"] == "config" for c in changes):
        what, fix = "with other flags", "Give the same flags"
    else:
        what, fix = "on other data", "Give the --data_dir of that data"
    return (
        f"The run {path} was begun {what}: {', '.join(told(changes))}. {fix} to resume it, choose "
        f"another --name, or go on with the change by --allow_changed."
    )
