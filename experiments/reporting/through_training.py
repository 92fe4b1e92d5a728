"""A table of the same runs at several epochs: what a comparison says that ends early or late."""

from collections.abc import Mapping, Sequence

from experiments.reporting.paired_statistics import difference_cell, mean_and_deviation, mean_cell
from experiments.reporting.run_records import NO_VALUE, Group, Record, ReportError, method_label
from experiments.reporting.table_notes import provenance
from experiments.reporting.table_parts import (
    STATISTICS,
    Table,
    TableOptions,
    differing_settings,
    partner,
)

# The readings of an evaluation, from the codes.
_ACCURACIES = ("quantized_accuracy", "recalibrated_accuracy")
_CHANGED = "changed_codes"


def through_training_table(
    groups: Mapping[Group, Sequence[Record]], options: TableOptions
) -> Table:
    """A row an epoch and method, from the codes as they were at the evaluation of that epoch.

    Float runs have no row: their codes are not what they train.

    Args:
      groups: the runs, by `options.groups`.

    Raises ReportError: an epoch that is no number, or that a run did not evaluate; no run.
    """
    at = options.groups.index("method")
    shown = {group: runs for group, runs in groups.items() if group[at] != "float"}
    if not shown:
        raise ReportError("--epochs: there is no run that read the test set, but for float")
    further = [flag for flag in options.groups if flag != "method"]
    rows = []
    for epoch in options.epochs:
        for group, runs in shown.items():
            compared = partner(group, shown, options.groups, options.baseline)
            values = [value for i, value in enumerate(group) if i != at]
            cells = [epoch, method_label(group[at]), *map(str, values), str(len(runs))]
            evaluations = _evaluations(runs, epoch)
            readings = [_by_seed(evaluations, key) for key in _ACCURACIES]
            cells += [mean_cell(list(reading.values()), len(runs)) for reading in readings]
            if runs is compared:
                cells += ["baseline"] * len(readings)
            else:
                others = _evaluations(compared, epoch)
                against = [_by_seed(others, key) for key in _ACCURACIES]
                cells += map(difference_cell, readings, against)
            changed = list(_by_seed(evaluations, _CHANGED).values())
            cells.append(f"{mean_and_deviation(changed)[0]:.1f}" if changed else NO_VALUE)
            rows.append(tuple(cells))
    baseline = method_label(options.baseline)
    header = (
        *("epoch", "method"),
        *(flag.replace("_", " ") for flag in further),
        "n",
        *(f"{statistics} statistics" for statistics in STATISTICS),
        *(f"minus {baseline}, {statistics}" for statistics in STATISTICS),
        "codes changed (%)",
    )
    caption = (
        "Mean ± sample standard deviation over n seeds on validation images, from the codes as "
        "they were then, read with running and with re-estimated batch-norm statistics. "
        f"Differences to {baseline} are paired by seed; in brackets the 95 % confidence interval "
        "of their mean (t distribution). Codes changed: since the evaluation before. "
        f"{differing_settings(shown, options, ())} "
        f"{provenance([run for runs in shown.values() for run in runs])}"
    )
    return Table("Validation accuracy (%) through training", header, tuple(rows), caption)


def _evaluations(runs: Sequence[Record], epoch: str) -> dict[int, Mapping[str, float]]:
    """The evaluation of that epoch, by seed."""
    try:
        asked = float(epoch)
    except ValueError:
        raise ReportError(f"--epochs: {epoch!r} is no number of epochs") from None
    found = {}
    for run in runs:
        at = {float(evaluation["epoch"]): evaluation for evaluation in run.metrics}
        if asked not in at:
            known = ", ".join(f"{one:g}" for one in sorted(at))
            raise ReportError(f"--epochs={epoch}: {run.name} was evaluated at {known}")
        found[run.seed] = at[asked]
    return found


def _by_seed(evaluations: Mapping[int, Mapping[str, float]], key: str) -> dict[int, float]:
    """A reading in percent, where there is one."""
    return {seed: 100 * one[key] for seed, one in evaluations.items() if one.get(key) is not None}
