"""The rule by which trials choose a study's settings, from their records."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.run_records import Record
from experiments.reporting.table_parts import best_keys
from experiments.study_design.design import Choice, StudyError
from experiments.study_design.expansion import Settings, group_of


def choose(choice: Choice, trials: Sequence[Record]) -> Settings:
    """The best settings by the values of the choice's `per` flags.

    Args:
      trials: all of them; what is compared has the same seeds.

    Raises:
      StudyError: trials of other seeds than those they are compared with, or without a finite
        reading.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Record]]] = {}
    for record in trials:
        tried = groups.setdefault(group_of(choice, record.config), {})
        setting = tuple(record.config[flag] for flag in choice.flags)
        tried.setdefault(setting, []).append(record)
    return {
        group: dict(zip(choice.flags, _best(choice, group, tried), strict=True))
        for group, tried in groups.items()
    }


def _best(
    choice: Choice, group: tuple[Any, ...], tried: Mapping[tuple[Any, ...], Sequence[Record]]
) -> tuple[Any, ...]:
    of = ", ".join(f"{flag}={value}" for flag, value in zip(choice.per, group, strict=True))
    seeds = {tuple(sorted(record.seed for record in records)) for records in tried.values()}
    if len(seeds) > 1:
        raise StudyError(f"the trials of {of} have different seeds: {sorted(seeds)}")
    means = {}
    for setting, records in tried.items():
        readings = [_reading(choice, record) for record in records]
        mean = statistics.fmean(readings)
        if math.isfinite(mean):
            means[setting] = mean
    if not means:
        raise StudyError(f"no trial of {of} has a reading on validation images")
    # max keeps the first of equals: the smaller rate.
    return max(sorted(means), key=lambda setting: means[setting])


def _reading(choice: Choice, record: Record) -> float:
    running, fresh = best_keys(record.method)
    key = fresh if choice.statistics == "re-estimated" else running
    value = record.accuracy("validation", key)
    if value is None:
        raise StudyError(f"{record.name} was not read on validation images")
    return value
