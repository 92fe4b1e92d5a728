"""One factor at a time: settings that differ from a default one, compared with it by seed."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.paired_statistics import difference_cell, mean_cell
from experiments.reporting.run_records import (
    Record,
    ReportError,
    check_seeds,
    distinct,
    group_records,
    method_label,
    sort_key,
    value_text,
)
from experiments.reporting.table_notes import provenance
from experiments.reporting.table_parts import (
    STATISTICS,
    Table,
    TableOptions,
    best_keys,
    by_seed,
    lines_of,
)

Change = tuple[tuple[str, str], ...]  # flags that differ from the default, and their values
Settings = dict[tuple[Change, str], list[Record]]  # by what differs, and method
DEFAULT = "default"


def ablation_settings(records: Sequence[Record], options: TableOptions) -> Settings:
    """The runs by what differs from their method's default; the default itself comes first.

    Methods without a default are left out; so are runs that did not read the test set, where all
    runs of the default did.

    Raises ReportError: no run's name begins so; the default of a method is more than one setting; a
    seed was run twice.
    """
    begins = tuple(options.ablation.split(","))
    chosen = [record for record in records if record.name.startswith(begins)]
    if not chosen:
        names = ", ".join(distinct(record.name.rpartition("/")[0] + "/" for record in records))
        raise ReportError(
            f"--ablation={options.ablation}: no run's name begins so; there are: {names}"
        )
    defaults: dict[str, Record] = {}
    for (method,), members in group_records(chosen, ("method",), options.ignore).items():
        other = defaults.setdefault(_base(members[0]), members[0])
        if other is not members[0]:
            raise ReportError(
                f"--ablation={options.ablation} is two settings of one method, "
                f"{method_label(other.method)} and {method_label(method)}: name one of them"
            )
    tested = all(record.is_final for record in chosen)
    settings: Settings = {}
    for record in records:
        default = defaults.get(_base(record))
        if default is None or (tested and not record.is_final):
            continue
        settings.setdefault((_change(record, default, options), _base(record)), []).append(record)
    for (change, method), members in settings.items():
        check_seeds(f"{method_label(method)}, {change_text(change)}", members)
    return {
        key: sorted(settings[key], key=lambda record: record.seed)
        for key in sorted(settings, key=lambda key: _order(key, options))
    }


def ablation_table(settings: Settings, options: TableOptions) -> Table:
    """A row a setting and method, with its differences to the method's default and the baseline."""
    runs = [record for members in settings.values() for record in members]
    part = "test" if all(record.is_final for record in runs) else "validation"
    rows = []
    for (change, method), members in settings.items():
        for label, keys in lines_of(method):
            readings = [by_seed(members, part, key) for key in keys]
            cells = [change_text(change), label, str(len(members))]
            cells += [mean_cell(list(r.values()), len(members)) for r in readings]
            for reading, key in zip(readings, keys, strict=True):
                default = by_seed(settings[(), method], part, key)
                cells.append(difference_cell(reading, default) if change else DEFAULT)
            baseline = best_keys(options.baseline)
            if method == options.baseline and keys == baseline:
                cells.append("baseline")
            else:
                others = by_seed(_baseline(settings, change, options), part, baseline[1])
                cells.append(difference_cell(readings[1], others))
            rows.append(tuple(cells))
    name = method_label(options.baseline)
    header = (
        *("setting", "method", "n"),
        *(f"{statistics} statistics" for statistics in STATISTICS),
        *(f"minus default, {statistics}" for statistics in STATISTICS),
        f"minus {name}, {STATISTICS[1]}",
    )
    caption = (
        "A row tells in which flags it differs from the default setting of its method; all others "
        f"are alike. {_defaults(settings)} Mean ± sample standard deviation over n seeds, from the "
        "integer codes (float: from the weights as trained), read with running and with "
        "re-estimated batch-norm statistics. Differences to the default, and to "
        f"{name} of the same row's setting, are paired by seed; in brackets the 95 % confidence "
        f"interval of their mean (t distribution). {provenance(runs)}"
    )
    return Table(f"One change at a time: {part} accuracy (%)", header, tuple(rows), caption)


def change_text(change: Change) -> str:
    """What differs, as it is given on the command line."""
    return ", ".join(f"`{flag}={value}`" for flag, value in change) or DEFAULT


def _base(record: Record) -> str:
    return str(record.config["method"])


def _change(record: Record, default: Record, options: TableOptions) -> Change:
    flags = {*record.config, *default.config} - {*options.ignore, "method"}
    # What was tuned anew for a change stands after the change.
    return tuple(
        (flag, value_text(record.value(flag)))
        for flag in sorted(flags, key=lambda flag: (flag in options.tuned, flag))
        if record.value(flag) != default.value(flag)
    )


def factor(change: Change, options: TableOptions) -> Change:
    """The change without what was tuned anew for it; all of it, where nothing else is changed."""
    return tuple(one for one in change if one[0] not in options.tuned) or change


def _order(key: tuple[Change, str], options: TableOptions) -> tuple[Any, ...]:
    change, method = key
    first = factor(change, options)

    def values(change: Change) -> list[Any]:
        return sort_key(float(value) if _is_number(value) else value for _, value in change)

    return [flag for flag, _ in first], values(first), sort_key([method]), values(change)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _baseline(settings: Settings, change: Change, options: TableOptions) -> Sequence[Record]:
    """The baseline's runs under the same change, of which it may not read or tune each flag."""
    default = settings.get(((), options.baseline))
    if default is None:
        return []

    def shared(change: Change) -> Change:
        return tuple(c for c in change if c[0] not in options.tuned and default[0].reads(c[0]))

    if not shared(change):
        return default
    found = [
        members
        for (other, method), members in settings.items()
        if method == options.baseline and shared(other) == shared(change)
    ]
    return found[0] if len(found) == 1 else []


def _defaults(settings: Mapping[tuple[Change, str], Sequence[Record]]) -> str:
    """The default's values of all flags that a row changes."""
    told = []
    for flag in distinct(flag for change, _ in settings for flag, _ in change):
        methods: dict[str, list[str]] = {}
        for (change, method), members in settings.items():
            if not change and members[0].reads(flag):
                methods.setdefault(value_text(members[0].value(flag)), []).append(method)
        if len(methods) == 1:
            told += [f"`{flag}={value}`" for value in methods]
        else:
            told += [
                f"`{flag}={value}` ({', '.join(map(method_label, names))})"
                for value, names in methods.items()
            ]
    return f"Default: {', '.join(told)}." if told else ""
