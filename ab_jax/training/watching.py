"""What is seen of a run as it trains: its progress and, where asked for, a trace of some steps."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ab_jax.products import Range, check_ranges

PROFILED_STEPS = 10, 20  # counted from the first one, which compiles


@contextlib.contextmanager
def shown_progress(
    first: int, steps: int, enabled: bool
) -> Iterator[Callable[[int, dict[str, Any], float], None]]:
    """Within it, what it yields shows a step's metrics and the speed, in images/s.

    Args:
      first: steps done before.
      steps: in all.
      enabled: whether it shows anything.
    """
    if not enabled:  # nor would what others print be seen
        yield lambda done, metrics, speed: None
        return
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, completed=first, metrics="compiling")
        if not console.is_terminal:
            console.print(f"step {first}/{steps}: compiling", soft_wrap=True)

        def show(done: int, metrics: dict[str, Any], speed: float) -> None:
            text = (
                f"loss {float(metrics['loss']):.3f}, accuracy {float(metrics['accuracy']):.3f}, "
                f"alpha {float(metrics['alpha']):.3f}, {speed:,.0f} images/s"
            )
            progress.update(task, completed=done, metrics=text)
            if not console.is_terminal:
                console.print(f"step {done}/{steps}: {text}", soft_wrap=True)

        yield show


def warn_of_cut_off(ranges: Mapping[str, Any], shares: Array) -> None:
    """Name the inputs of which unsigned ranges cut off a part.

    Args:
      ranges: the collection `RANGES` of the model.
      shares: `cut_off` of a step's metrics.

    Warns:
      CutOffWarning: as `ab_jax.products.check_ranges`.
    """
    leaves = jax.tree.leaves_with_path(ranges)
    addresses = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    seen = zip(addresses, np.asarray(shares), strict=True)
    check_ranges({address: Range.of(1.0)._replace(cut=share) for address, share in seen})


@contextlib.contextmanager
def profiler(enabled: bool, path: Path) -> Iterator[Callable[[int], None]]:
    """Within it, what it yields is told of each step, from 0, and traces `PROFILED_STEPS`.

    Args:
      enabled: whether it does anything. Of several steps in a call, from the next call on.
      path: the run's directory, where the trace goes to `profile`.
    """
    first, last = PROFILED_STEPS
    running = done = False

    def profile(step: int) -> None:
        nonlocal running, done
        if enabled and not done and step >= first:
            jax.profiler.start_trace(str(path / "profile"))
            running = done = True
        elif running and step >= last:
            jax.profiler.stop_trace()
            running = False

    try:
        yield profile
    finally:
        if running:
            jax.profiler.stop_trace()
