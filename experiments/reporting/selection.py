"""The trials by which each method's settings were chosen, on validation images."""

import math
import statistics
from collections.abc import Mapping, Sequence

from experiments.reporting.paired_statistics import NOT_RUN, mean_cell
from experiments.reporting.run_records import (
    Group,
    Record,
    distinct,
    group_records,
    method_label,
    sort_key,
    value_text,
)
from experiments.reporting.table_notes import provenance
from experiments.reporting.table_parts import Table, TableOptions, best_keys, by_seed, spoken


def selection_table(
    records: Sequence[Record], finals: Mapping[Group, Sequence[Record]], options: TableOptions
) -> Table | None:
    """A row a method and, where more than one flag was tuned, value of the further ones.

    Args:
      records: trials and final runs.
      finals: the final runs, grouped.

    Returns None without trials. Raises ReportError where a cell would mix unlike runs.
    """
    first, *further = options.tuned
    trials = [r for r in records if not r.is_final and first in r.config]
    if not trials:
        return None
    flags = tuple(flag for flag in options.groups if flag not in options.tuned)
    row_flags = (*flags, *further)
    cells = group_records(trials, (*row_flags, first), options.ignore)
    values = distinct(group[-1] for group in cells)
    methods: dict[Group, list[Group]] = {}  # the rows of a method at one level
    for row in sorted({group[:-1] for group in cells}, key=sort_key):
        methods.setdefault(row[: len(flags)], []).append(row)
    at_method = flags.index("method")
    rows = []
    for setting, of_method in methods.items():
        key = best_keys(setting[at_method])[1]
        members = {
            (row, value): cells.get((*row, value), []) for row in of_method for value in values
        }
        readings = {
            cell: list(by_seed(runs, "validation", key).values()) for cell, runs in members.items()
        }
        texts = {cell: mean_cell(readings[cell], len(runs)) for cell, runs in members.items()}
        means = {cell: statistics.fmean(found) for cell, found in readings.items() if found}
        finite = [cell for cell, mean in means.items() if math.isfinite(mean)]
        if finite:
            # max keeps the first of equals: a tie goes to the smaller rate.
            rates_first = sorted(finite, key=lambda cell: sort_key((cell[1], *cell[0])))
            chosen = max(rates_first, key=lambda cell: means[cell])
            texts[chosen] = f"**{texts[chosen]}**"
        total = sum(map(len, members.values()))
        for row in of_method:
            count = sum(len(members[row, value]) for value in values)
            rows.append(
                (
                    method_label(setting[at_method]),
                    *(value_text(v) for i, v in enumerate(row) if i != at_method),
                    *(texts[row, value] for value in values),
                    str(count) if len(of_method) == 1 else f"{count} of {total}",
                    _final_values(finals, dict(zip(row_flags, row, strict=True)), first),
                )
            )
    name = "rate" if first == "learning_rate" else first.replace("_", " ")
    header = (
        "method",
        *(flag.replace("_", " ") for flag in row_flags if flag != "method"),
        *(f"{name} {value_text(value)}" for value in values),
        "trials",
        f"{name} of final runs",
    )
    best = f"best {spoken(options.tuned)} of each method"
    caption = (
        "Runs that did not read the test set; batch-norm statistics re-estimated. In bold the "
        f"{best}. {provenance(trials)}"
    )
    title = f"Validation accuracy (%) by {spoken(options.tuned)}"
    return Table(title, header, tuple(rows), caption)


def _final_values(
    finals: Mapping[Group, Sequence[Record]], row: Mapping[str, object], flag: str
) -> str:
    """The values of `flag` in the final runs that are alike to a row in its flags."""
    used = distinct(
        record.value(flag)
        for members in finals.values()
        for record in members
        if all(record.value(other) == value for other, value in row.items())
    )
    return ", ".join(map(value_text, used)) or NOT_RUN
