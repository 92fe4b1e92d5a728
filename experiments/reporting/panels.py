"""Which runs share a plot: a study's methods; those of one level; the values of one flag."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.reporting.ablation import ablation_settings, change_text, factor
from experiments.reporting.across_levels import of_these_levels
from experiments.reporting.figures import CURVES, SIZES
from experiments.reporting.run_records import (
    Record,
    group_records,
    method_label,
    value_text,
    without_starts,
)
from experiments.reporting.table_parts import TableOptions
from experiments.reporting.themes import Series


@dataclass(frozen=True)
class Panel:
    """Runs that are drawn together.

    Attributes:
      name: what is added to the plots' file names, may be empty; `title` to their headings.
      series: the lines.
      kinds: names of the plots to draw.
    """

    name: str
    title: str
    series: Sequence[Series]
    kinds: tuple[str, ...]


def panels(records: Sequence[Record], options: TableOptions) -> list[Panel]:
    """The panels of these records; the final runs', or the trials' where there are no others."""
    records = without_starts(records)
    if options.ablation:
        return _of_changes(records, options)
    if options.columns:
        records = of_these_levels(records, options)
    finals = [record for record in records if record.is_final]
    flags = options.groups
    if not finals:
        flags = (*flags, *(flag for flag in options.tuned if flag not in flags))
    flags = tuple(flag for flag in flags if all(r.has(flag) for r in finals or records))
    lines: dict[str, list[Series]] = {}  # by level
    for group, members in group_records(finals or records, flags, options.ignore).items():
        others = dict(zip(flags, group, strict=True))
        method = others.pop("method")
        level = value_text(others.pop(options.level_flag)) if options.columns else ""
        parts = [f"{flag.replace('_', ' ')} {value}" for flag, value in others.items()]
        label = ", ".join([method_label(method), *parts])
        lines.setdefault(level, []).append(_series(label, members))
    every = [line for level in lines.values() for line in level]
    flag = options.level_flag.replace("_", " ")
    curves = [
        Panel(f"_{level}" if level else "", f", {flag} {level}" if level else "", series, CURVES)
        for level, series in lines.items()
        # Levels do not change float's training: alone it would be the same plot again.
        if not level or any(line.method != "float" for line in series)
    ]
    return [*curves, Panel("", "", every, SIZES if finals else ())]


def _of_changes(records: Sequence[Record], options: TableOptions) -> list[Panel]:
    """A panel for each set of flags that is changed together, the default among its lines."""
    settings = ablation_settings(records, options)
    every: list[Series] = []
    lines: dict[tuple[str, ...], list[Series]] = {}
    for change, _ in settings:
        if change:
            lines.setdefault(tuple(flag for flag, _ in factor(change, options)), [])
    for (change, method), members in settings.items():
        text = change_text(change).replace("`", "")
        series = _series(f"{method_label(method)}, {text}", members)
        every.append(series)
        own = tuple(flag for flag, _ in factor(change, options))
        for flags, drawn in lines.items():
            if not change or own == flags:
                drawn.append(series)
    curves = [
        Panel("_" + "_".join(flags), f", {', '.join(flags)}", drawn, CURVES)
        for flags, drawn in lines.items()
    ]
    finals = all(record.is_final for line in every for record in line.records)
    return [*curves, Panel("", "", every, SIZES if finals else ())]


def _series(label: str, members: Sequence[Record]) -> Series:
    return Series(label, members[0].method, members, members[0].size)
