"""A study's tables: mean, deviation and paired differences of its runs, as Markdown.

    print(readme_table(read_records(["results/binarynet_cifar10"])))

Accuracies are in percent. The main table holds the final runs, which read the test set; the second
one the trials, which did not, and by which the learning rates were chosen.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.recipes.free_flags import FREE_FLAGS
from experiments.reporting.paired_statistics import NOT_RUN, difference_cell, mean_cell
from experiments.reporting.provenance import commands, provenance
from experiments.reporting.readings import (
    METHODS,
    Group,
    Record,
    ReportError,
    distinct,
    group_records,
    sort_key,
)

PTQ = "float, rounded after training (PTQ)"
# A method's two readings: with running and with re-estimated batch-norm statistics.
AS_TRAINED = ("blended", "blended_recalibrated")
FROM_CODES = ("quantized", "quantized_recalibrated")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Which runs make a row, and what the rows are compared with.

    The runs of a row are alike in every flag but those of `ignore`: the seed, and flags that
    cannot change a result.
    """

    group_by: tuple[str, ...] = ("method",)
    baseline: str = "ste"
    ignore: tuple[str, ...] = ("seed", "watch", *sorted(FREE_FLAGS))

    def __post_init__(self) -> None:
        if "method" not in self.group_by:
            raise ReportError("--group_by must hold method: rows are compared by their method")


@dataclass(frozen=True)
class Table:
    """Cells of Markdown text; the first column is aligned left, the others right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str

    def to_markdown(self) -> str:
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{table}\n\n{self.caption}"


@dataclass(frozen=True)
class StudyTables:
    """The tables of a study and the commands that repeat its final runs."""

    accuracy: Table
    selection: Table | None
    commands: str

    def to_markdown(self) -> str:
        parts = [self.accuracy.to_markdown()]
        if self.selection is not None:
            parts.append(self.selection.to_markdown())
        if self.commands:
            code = f"```bash\n{self.commands}\n```"
            parts.append(f"<details><summary>Commands</summary>\n\n{code}\n\n</details>")
        return "\n\n".join(parts)


def study_tables(records: Sequence[Record], options: TableOptions | None = None) -> StudyTables:
    """The tables of these records. Raises ReportError where a row would mix unlike runs."""
    options = options or TableOptions()
    methods = {record.method for record in records}
    if options.baseline not in methods | METHODS.keys():
        known = ", ".join(sorted(methods | METHODS.keys()))
        raise ReportError(f"--baseline={options.baseline} is no method; there are: {known}")
    finals = [record for record in records if record.is_final]
    groups = group_records(finals, options.group_by, options.ignore)
    return StudyTables(
        _accuracy_table(records, groups, options),
        _selection_table(records, groups, options),
        commands(list(groups.values())),
    )


def readme_table(records: Sequence[Record], options: TableOptions | None = None) -> str:
    """The Markdown that stands in a README between the markers of a study."""
    return study_tables(records, options).to_markdown()


def method_label(method: str) -> str:
    """A method's name in tables and plots."""
    return METHODS.get(method, method)


# The main table


def _accuracy_table(
    records: Sequence[Record], groups: Mapping[Group, Sequence[Record]], options: TableOptions
) -> Table:
    finals = [record for members in groups.values() for record in members]
    at_method = options.group_by.index("method")
    others = tuple(flag for flag in options.group_by if flag != "method")
    shown = others
    if "learning_rate" not in others and any("learning_rate" in r.config for r in finals):
        shown = (*others, "learning_rate")
    baselines = {group: m for group, m in groups.items() if group[at_method] == options.baseline}

    missing = {record.method for record in records} - {group[at_method] for group in groups}
    empty: dict[Group, list[Record]] = {
        tuple(method if flag == "method" else NOT_RUN for flag in options.group_by): []
        for method in missing
    }
    baseline_keys = AS_TRAINED if options.baseline == "float" else FROM_CODES
    rows = []
    for group, members in sorted({**groups, **empty}.items(), key=lambda item: sort_key(item[0])):
        method = group[at_method]
        compared = _baseline_of(group, baselines, at_method)
        lines = [(method_label(method), FROM_CODES)]
        if method == "float":
            lines = [("float", AS_TRAINED), (PTQ, FROM_CODES)]
        for label, keys in lines:
            cells = [label, *(_flag_cell(members, flag) for flag in shown), str(len(members))]
            readings = [_by_seed(members, "test", key) for key in keys]
            cells += [mean_cell(list(r.values()), len(members)) for r in readings]
            for reading, key in zip(readings, baseline_keys, strict=True):
                if members and members is compared and keys == baseline_keys:
                    cells.append("baseline")
                else:
                    cells.append(difference_cell(reading, _by_seed(compared, "test", key)))
            rows.append(tuple(cells))
    baseline = method_label(options.baseline)
    header = (
        "method",
        *(flag.replace("_", " ") for flag in shown),
        "n",
        "running statistics",
        "re-estimated statistics",
        f"minus {baseline}, running",
        f"minus {baseline}, re-estimated",
    )
    caption = (
        "Mean ± sample standard deviation over n seeds, from the integer codes (float: from the "
        "weights as trained), read with running and with re-estimated batch-norm statistics. "
        f"Differences to {baseline} are paired by seed; in brackets the 95 % confidence interval "
        f"of their mean (t distribution). {provenance(finals) if finals else ''}"
    ).strip()
    return Table("Test accuracy (%)", header, tuple(rows), caption)


def _baseline_of(
    group: Group, baselines: Mapping[Group, Sequence[Record]], at_method: int
) -> Sequence[Record]:
    """The baseline's only group, or the one equal in all flags but the method."""
    if len(baselines) == 1:
        return next(iter(baselines.values()))
    for other, members in baselines.items():
        if all(a == b for i, (a, b) in enumerate(zip(group, other, strict=True)) if i != at_method):
            return members
    return []


def _by_seed(members: Sequence[Record], part: str, key: str) -> dict[int, float]:
    readings = {record.seed: record.accuracy(part, key) for record in members}
    return {seed: value for seed, value in readings.items() if value is not None}


def _flag_cell(members: Sequence[Record], flag: str) -> str:
    return _text(members[0].config.get(flag)) if members else NOT_RUN


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# The choice of the learning rate


def _selection_table(
    records: Sequence[Record], finals: Mapping[Group, Sequence[Record]], options: TableOptions
) -> Table | None:
    trials = [r for r in records if not r.is_final and "learning_rate" in r.config]
    if not trials:
        return None
    flags = tuple(flag for flag in options.group_by if flag != "learning_rate")
    cells = group_records(trials, (*flags, "learning_rate"), options.ignore)
    rates = sorted({group[-1] for group in cells})
    rows = []
    for row in sorted({group[:-1] for group in cells}, key=sort_key):
        members = {rate: cells.get((*row, rate), []) for rate in rates}
        named = dict(zip(flags, row, strict=True))
        key = (AS_TRAINED if named["method"] == "float" else FROM_CODES)[1]
        readings = {
            rate: list(_by_seed(members[rate], "validation", key).values()) for rate in rates
        }
        texts = {rate: mean_cell(readings[rate], len(members[rate])) for rate in rates}
        means = {rate: statistics.fmean(values) for rate, values in readings.items() if values}
        finite = [rate for rate, mean in means.items() if math.isfinite(mean)]
        if finite:
            # max keeps the first of equals, and rates ascend: a tie goes to the smaller rate.
            chosen = max(finite, key=lambda rate: means[rate])
            texts[chosen] = f"**{texts[chosen]}**"
        used = distinct(
            record.config.get("learning_rate")
            for record in itertools.chain.from_iterable(finals.values())
            if all(record.config[flag] == value for flag, value in named.items())
        )
        rows.append(
            (
                method_label(named["method"]),
                *(_text(named[flag]) for flag in flags if flag != "method"),
                *texts.values(),
                str(sum(map(len, members.values()))),
                ", ".join(map(_text, used)) or NOT_RUN,
            )
        )
    header = (
        "method",
        *(flag.replace("_", " ") for flag in flags if flag != "method"),
        *(f"rate {_text(rate)}" for rate in rates),
        "trials",
        "rate of final runs",
    )
    caption = (
        "Runs that did not read the test set; batch-norm statistics re-estimated. In bold the best "
        f"learning rate of each method. {provenance(trials)}"
    )
    return Table("Validation accuracy (%) by learning rate", header, tuple(rows), caption)
