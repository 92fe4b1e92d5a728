"""A study's tables: mean, deviation and paired differences of its runs, as Markdown.

    print(readme_table(read_records(["results/binarynet_cifar10"])))

Accuracies are in percent. The main table holds the final runs, which read the test set; the second
one the trials, which did not, and by which the learning rates were chosen.
"""

from collections.abc import Mapping, Sequence

from experiments.reporting.ablation import ablation_settings, ablation_table
from experiments.reporting.across_levels import of_these_levels, tables_across_levels
from experiments.reporting.paired_statistics import NOT_RUN, difference_cell, mean_cell
from experiments.reporting.run_records import (
    NO_VALUE,
    Group,
    Record,
    ReportError,
    group_records,
    method_label,
    sort_key,
    without_starts,
)
from experiments.reporting.selection import selection_table
from experiments.reporting.table_notes import commands, provenance
from experiments.reporting.table_parts import (
    StudyTables,
    Table,
    TableOptions,
    best_keys,
    by_seed,
    differing_settings,
    flag_cell,
    is_method,
    lines_of,
    partner,
)
from experiments.reporting.through_training import through_training_table
from experiments.settings.methods import METHODS


def study_tables(records: Sequence[Record], options: TableOptions | None = None) -> StudyTables:
    """The tables of these records. Raises ReportError where a row would mix unlike runs."""
    options = options or TableOptions()
    records = without_starts(records)
    methods = {record.method for record in records}
    if not any(is_method(method, options.baseline) for method in methods | METHODS.keys()):
        known = ", ".join(sorted(methods | METHODS.keys()))
        raise ReportError(f"--baseline={options.baseline} is no method; there are: {known}")
    if options.ablation:
        settings = ablation_settings(records, options)
        table = ablation_table(settings, options)
        return StudyTables((table,), None, commands(list(settings.values())))
    if options.columns:
        records = of_these_levels(records, options)
    finals = [record for record in records if record.is_final]
    groups = group_records(finals, options.groups, options.ignore)
    if options.epochs:
        table = through_training_table(groups, options)
        return StudyTables((table,), None, commands(list(groups.values())))
    # Of trials alone there is nothing to say but what they chose.
    accuracies: tuple[Table, ...] = ()
    if options.columns:
        accuracies = tables_across_levels(records, groups, options)
    elif finals:
        accuracies = (_accuracy_table(records, groups, options),)
    selection = selection_table(records, groups, options)
    return StudyTables(accuracies, selection, commands(list(groups.values())))


def readme_table(records: Sequence[Record], options: TableOptions | None = None) -> str:
    """The Markdown that stands in a README between the markers of a study."""
    return study_tables(records, options).to_markdown()


def _accuracy_table(
    records: Sequence[Record], groups: Mapping[Group, Sequence[Record]], options: TableOptions
) -> Table:
    finals = [record for members in groups.values() for record in members]
    at_method = options.group_by.index("method")
    others = tuple(flag for flag in options.group_by if flag != "method")
    tuned = (
        flag
        for flag in options.tuned
        if flag not in others and any(flag in record.config for record in finals)
    )
    shown = (*others, *tuned)
    missing = {record.method for record in records} - {group[at_method] for group in groups}
    empty: dict[Group, list[Record]] = {
        tuple(method if flag == "method" else NOT_RUN for flag in options.group_by): []
        for method in missing
    }
    baseline_keys = best_keys(options.baseline)
    # Against float as the baseline its own columns say it already.
    with_gap = options.baseline != "float" and any(record.method == "float" for record in finals)
    rows = []
    for group, members in sorted({**groups, **empty}.items(), key=lambda item: sort_key(item[0])):
        compared = partner(group, groups, options.group_by, options.baseline)
        for label, keys in lines_of(group[at_method]):
            cells = [label, *(flag_cell(members, flag) for flag in shown), str(len(members))]
            readings = [by_seed(members, "test", key) for key in keys]
            cells += [mean_cell(list(r.values()), len(members)) for r in readings]
            for reading, key in zip(readings, baseline_keys, strict=True):
                if members and members is compared and keys == baseline_keys:
                    cells.append("baseline")
                else:
                    cells.append(difference_cell(reading, by_seed(compared, "test", key)))
            if with_gap:
                key = best_keys("float")[1]
                trained = partner(group, groups, options.group_by, "float")
                alone = members and members is trained and keys == best_keys("float")
                gap = difference_cell(readings[1], by_seed(trained, "test", key))
                cells.append(NO_VALUE if alone else gap)
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
        *(["minus float, re-estimated"] if with_gap else []),
    )
    to = f"{baseline} and to float" if with_gap else baseline
    caption = (
        "Mean ± sample standard deviation over n seeds, from the integer codes (float: from the "
        "weights as trained), read with running and with re-estimated batch-norm statistics. "
        f"Differences to {to} are paired by seed; in brackets the 95 % confidence interval "
        f"of their mean (t distribution). {differing_settings(groups, options, shown)}"
    )
    origin = provenance(finals) if finals else ""
    return Table("Test accuracy (%)", header, tuple(rows), f"{caption.strip()} {origin}".strip())
