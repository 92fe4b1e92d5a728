"""The core of the benchmarks: cases in turns, each as a ratio to the first, in a Markdown table.

All in one process: in every round each case runs once, in an order drawn anew, so that neither a
slower minute of the machine nor what a neighbour leaves in the caches falls on one case more than
on another. A ratio is taken within a round. A table gives its median over the rounds with the 95 %
interval of that median, from the order of the ratios alone, as the noise of a shared machine is not
normal.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from scipy.stats import binom  # type: ignore[import-untyped]

Case = TypeVar("Case")
Measured = TypeVar("Measured")


class Seconds(NamedTuple):
    """What a call took; `processor` is that of all threads of this process together."""

    wall: float
    processor: float


def timed(call: Callable[[], Any]) -> Seconds:
    """Time a call, up to the end of what JAX computes for it."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def going_on(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[], Seconds]:
    """A case for `in_rounds`: a training step, each time from the state that the last one left.

    Args:
      step: `state -> (state, anything)`; it may give the state's memory away.
      state: the first one.
    """

    def call() -> tuple[Any, Any]:
        nonlocal state
        state, others = step(state)
        return state, others

    return lambda: timed(call)


def in_rounds(
    *groups: Mapping[Case, Callable[[], Measured]], rounds: int, seed: int
) -> dict[Case, list[Measured]]:
    """What each case measured in each round.

    Args:
      groups: what is compared with one another, each by name a function that runs once and returns
        what it measured. A round takes group after group, the cases of one in an order drawn anew.
      rounds: how many count; one before them compiles and warms up.
      seed: of the orders.
    """
    rng = np.random.default_rng(seed)
    found: dict[Case, list[Measured]] = {case: [] for group in groups for case in group}
    for number in range(rounds + 1):
        for group in groups:
            cases = list(group)
            for i in rng.permutation(len(cases)):
                measured = group[cases[i]]()
                if number:
                    found[cases[i]].append(measured)
    return found


def ratio_cells(
    readings: Mapping[str, Sequence[float]], told: Callable[[float], str], digits: int = 3
) -> dict[str, str]:
    """By case `1.021 [1.017, 1.027]`: median and interval of the ratios to the first case.

    Args:
      readings: of each case, by round.
      told: from the first case's median to what its own cell says of it, `1 (0.84 s)`.
      digits: behind the point.
    """
    first, *others = readings
    cells = {first: f"1 ({told(statistics.median(readings[first]))})"}
    for case in others:
        ratios = [a / b for a, b in zip(readings[case], readings[first], strict=True)]
        low, high = median_interval(ratios)
        interval = f"[{low:.{digits}f}, {high:.{digits}f}]"
        cells[case] = f"{statistics.median(ratios):.{digits}f} {interval}"
    return cells


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval that covers the median of what `values` were drawn from.

    The k-th smallest and the k-th largest value, with the largest k at which the chance that the
    median lies outside stays below `1 - confidence`; the whole range where there are too few.
    """
    ordered = sorted(values)
    k = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    return ordered[max(k, 1) - 1], ordered[-max(k, 1)]


def over_rounds(records: Sequence[Mapping[str, Any]]) -> str:
    """What a caption says of the cells: `median [95 % interval] over n = 25, 15 rounds`."""
    rounds = ", ".join(str(record["config"]["rounds"]) for record in records)
    return f"median [95 % interval] over n = {rounds} rounds"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns, so many, are aligned left and the others right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])
