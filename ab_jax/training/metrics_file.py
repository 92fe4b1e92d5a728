"""The lines of a run's metrics: appended one by one, and sealed by every checkpoint.

A line is on the disk before the checkpoint of its step is begun, and a checkpoint seals the lines
up to its step. What is cut off in between leaves lines that no checkpoint knows: a resumed run
drops them and computes them again. All others must be as they were written.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ab_jax.files import append_line, read_lines, write_whole

Seal = Sequence[str]  # of each line the first 16 hexadecimal digits of its SHA-256


class MetricsFile:
    """Lines of JSON, each with its `step`, in a file that one process alone writes.

    Args:
      path: of the file, which need not be there.
      writes: whether this process is the one.

    Raises:
      ValueError: a line that is none of metrics; names it and the way out.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path = path
        self._writes = writes
        self._lines = read_lines(path)  # what is known to be there
        self.read()

    def read(self) -> list[dict[str, Any]]:
        """The lines there are; of one that was cut off, nothing.

        Raises:
          ValueError: another process than this one has changed them.
        """
        lines = read_lines(self._path)
        if self._writes and lines != self._lines:
            number = _first_difference(lines, self._lines)
            raise ValueError(self._message(number, lines, "this process"))
        return self._parsed(lines)

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write a line, which is on the disk when this returns.

        Raises:
          ValueError: a number that is not finite, which JSON does not have; names it.
          OSError: it cannot be written; names the file and the fix.
        """
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} at step {metrics['step']}, which {self._path} cannot hold. "
                    f"Lower the learning rate, or clip gradients or weights, under another --name."
                )
        line = json.dumps(metrics, allow_nan=False)
        append_line(self._path, line)
        self._lines.append(line)

    def seal(self) -> Seal:
        """What a checkpoint is to hold of the lines up to now; they are still as they were written.

        Raises:
          ValueError: as `read`.
        """
        self.read()
        return [_digest(line) for line in self._lines]

    def cut_back(self, step: int, seal: Seal | None) -> None:
        """Drop the lines after a checkpoint's step.

        Args:
          step: of the checkpoint.
          seal: what it holds of the lines; None: nothing, being older than seals.

        Raises:
          ValueError: a line up to there is not as it was written; names it and the way out.
          OSError: as `append`.
        """
        if seal is None:
            of_steps = zip(self._parsed(self._lines), self._lines, strict=True)
            kept = [line for metrics, line in of_steps if metrics["step"] <= step]
        else:
            kept = self._lines[: len(seal)]
            digests = [_digest(line) for line in kept]
            if digests != list(seal):
                number, known_by = _first_difference(digests, seal), f"the checkpoint of {step}"
                raise ValueError(self._message(number, kept, known_by))
        if self._writes:
            text = "".join(f"{line}\n" for line in kept)
            write_whole(self._path, text.encode(errors="surrogateescape"))
        self._lines = kept

    def _parsed(self, lines: Sequence[str]) -> list[dict[str, Any]]:
        metrics: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                metrics.append(_metrics_of(line, metrics[-1]["step"] if metrics else 0))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self._path} is damaged in line {number}: {error}. Put the right line back, "
                    f"or remove {self._path.parent} to begin anew."
                ) from None
        return metrics

    def _message(self, number: int, lines: Sequence[str], known_by: str) -> str:
        what = "missing" if number > len(lines) else "not as it was written"
        return (
            f"{self._path} was changed: line {number}, which {known_by} knows, is {what}. Put it "
            f"back, or delete {self._path.parent / 'checkpoints'}/STEP of that step and later to "
            f"go on from before, or remove {self._path.parent} to begin anew."
        )


def _metrics_of(line: str, step_before: int) -> dict[str, Any]:
    """Of one line, which must be an object with a step that is not before the last one's."""
    if not line.isascii():  # which JSON as we write it is
        raise ValueError("it has bytes that no such line has")
    metrics = json.loads(line, parse_constant=_no_number)
    step = metrics.get("step") if isinstance(metrics, dict) else None
    if type(step) is not int:
        raise ValueError("it has no step, a whole number")
    if step < step_before:
        raise ValueError(f"step {step} comes after step {step_before}")
    return metrics


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()[:16]


def _first_difference(found: Sequence[str], wanted: Sequence[str]) -> int:
    """The number of the first line that differs, from 1."""
    pairs = enumerate(zip(found, wanted, strict=False), start=1)
    shorter = min(len(found), len(wanted))
    return next((number for number, (a, b) in pairs if a != b), shorter + 1)
