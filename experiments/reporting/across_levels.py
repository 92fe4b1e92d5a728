"""Tables over methods and levels: a row a method, a column a value of one flag."""

from collections.abc import Mapping, Sequence

from experiments.reporting.paired_statistics import difference_cell, mean_cell
from experiments.reporting.run_records import (
    Group,
    Record,
    ReportError,
    distinct,
    method_label,
    sort_key,
    value_text,
)
from experiments.reporting.table_notes import provenance
from experiments.reporting.table_parts import (
    AS_TRAINED,
    STATISTICS,
    Table,
    TableOptions,
    best_keys,
    by_seed,
    differing_settings,
    is_method,
    lines_of,
)

Cells = Mapping[tuple[Group, str], Sequence[Record]]  # by row, and level as text


def of_these_levels(records: Sequence[Record], options: TableOptions) -> list[Record]:
    """The records of the levels that `columns` names; all, where it names none.

    Raises ReportError for a flag that a record does not have.
    """
    flag, levels = options.level_flag, _asked(options)
    for record in records:
        if not record.has(flag):
            raise ReportError(f"--columns={flag}: {record.name} has no such flag")
    return [r for r in records if not levels or value_text(r.value(flag)) in levels]


def tables_across_levels(
    records: Sequence[Record], groups: Mapping[Group, Sequence[Record]], options: TableOptions
) -> tuple[Table, ...]:
    """Accuracy, difference to the baseline and, where float was run, difference to float.

    Each has both readings of batch-norm statistics. Cells without a run say so.

    Args:
      records: trials and final runs, for the rows and columns.
      groups: the final runs, by `options.groups`.
    """
    flag = options.level_flag
    names = options.groups
    rest = [i for i, name in enumerate(names) if name not in (flag, "method")]
    at_method, at_level = names.index("method"), names.index(flag)
    levels = _asked(options) or [
        value_text(value) for value in distinct(record.value(flag) for record in records)
    ]
    cells: dict[tuple[Group, str], Sequence[Record]] = {
        ((group[at_method], *(group[i] for i in rest)), value_text(group[at_level])): members
        for group, members in groups.items()
    }
    rows = sorted(
        {(record.method, *(record.value(names[i]) for i in rest)) for record in records},
        key=sort_key,
    )
    counts = [len(members) for members in groups.values()]
    usual = max(counts, key=counts.count) if counts else 0

    def table(title: str, caption: str, against: str | None) -> Table:
        lines = []
        for row in rows:
            for label, keys in lines_of(row[0]):
                if against is not None and (row[0], keys) == (against, best_keys(against)):
                    continue
                for which, statistics in enumerate(STATISTICS):
                    texts = [
                        _cell(cells, row, level, keys, which, against, usual) for level in levels
                    ]
                    lines.append((label, *map(value_text, row[1:]), statistics, *texts))
        others = (names[i].replace("_", " ") for i in rest)
        return Table(title, ("method", *others, "statistics", *levels), tuple(lines), caption)

    finals = [record for members in groups.values() for record in members]
    pairs = "Paired by seed; in brackets the 95 % confidence interval of the mean (t distribution)."
    settings = differing_settings(groups, options, ())
    origin = provenance(finals) if finals else ""
    found = [
        table(
            f"Test accuracy (%) by {flag.replace('_', ' ')}",
            f"Mean ± sample standard deviation over {usual} seeds, where no other n is given, from "
            "the integer codes (float: from the weights as trained, which no level changes), read "
            f"with running and with re-estimated batch-norm statistics. {settings} {origin}",
            None,
        )
    ]
    for asked in dict.fromkeys((options.baseline, "float")):
        for against in distinct(row[0] for row in rows if is_method(row[0], asked)):
            title = f"Test accuracy (%) minus {method_label(against)}"
            found.append(table(title, pairs, against))
    return tuple(found)


def _cell(
    cells: Cells,
    row: Group,
    level: str,
    keys: tuple[str, str],
    which: int,
    against: str | None,
    usual: int,
) -> str:
    readings = by_seed(_runs(cells, row, level, keys), "test", keys[which])
    if against is None:
        return mean_cell(list(readings.values()), usual)
    compared = best_keys(against)
    others = _runs(cells, (against, *row[1:]), level, compared)
    return difference_cell(readings, by_seed(others, "test", compared[which]))


def _runs(cells: Cells, row: Group, level: str, keys: tuple[str, str]) -> Sequence[Record]:
    """The runs of a cell; float as trained, which no level changes, may stand in for all levels."""
    if (found := cells.get((row, level))) is not None:
        return found
    if keys != AS_TRAINED:
        return []
    runs = [members for (other, _), members in cells.items() if other == row]
    readings = [[by_seed(members, "test", key) for key in keys] for members in runs]
    return runs[0] if runs and all(one == readings[0] for one in readings) else []


def _asked(options: TableOptions) -> list[str]:
    return [level for level in options.columns.partition(":")[2].split(",") if level]
