"""What a study's tables are made of: options, cells of Markdown, readings of runs by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.reporting.paired_statistics import NOT_RUN
from experiments.reporting.run_records import (
    NO_VALUE,
    Group,
    Record,
    ReportError,
    distinct,
    method_label,
    name_of,
    value_text,
)
from experiments.settings.config import FREE_FLAGS
from experiments.settings.methods import METHODS

PTQ = "float, rounded after training (PTQ)"
# A method's two readings: with running and with re-estimated batch-norm statistics.
AS_TRAINED = ("blended", "blended_recalibrated")
FROM_CODES = ("quantized", "quantized_recalibrated")
STATISTICS = ("running", "re-estimated")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Which runs make a row, and what the rows are compared with.

    Attributes:
      group_by: the runs of a row are alike in every flag but those of `ignore`.
      baseline: the method that the others are compared with.
      ignore: the seed, and flags that cannot change a result.
      tuned: flags chosen for each method by trials; the first one's values are the columns of the
        table of trials.
      columns: a flag whose values are the columns of a table over methods and levels, such as
        `quantizer`, or `quantizer:binary,ternary` for these levels in this order; empty: none.
      ablation: how the names of the default setting's runs begin, such as `final/` or
        `final/ste_,final/ab_`; every other setting is compared with it; empty: no such table.
      epochs: when the runs are compared, for a table on validation images through training; none:
        no such table.
    """

    group_by: tuple[str, ...] = ("method",)
    baseline: str = "ste"
    ignore: tuple[str, ...] = ("seed", "watch", *sorted(FREE_FLAGS))
    tuned: tuple[str, ...] = ("learning_rate",)
    columns: str = ""
    ablation: str = ""
    epochs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "method" not in self.group_by:
            raise ReportError("--group_by must hold method: rows are compared by their method")
        asked = {"columns": self.columns, "ablation": self.ablation, "epochs": self.epochs}
        if len(several := [f"--{name}" for name, value in asked.items() if value]) > 1:
            raise ReportError(f"{' and '.join(several)} are tables of their own: give one of them")
        if self.columns.partition(":")[0] == "method":
            raise ReportError("--columns=method: the methods are the rows; name another flag")

    @property
    def level_flag(self) -> str:
        """The flag of `columns`, or an empty text."""
        return self.columns.partition(":")[0]

    @property
    def groups(self) -> tuple[str, ...]:
        """`group_by`, and the flag of `columns`."""
        extra = {self.level_flag} - {"", *self.group_by}
        return (*self.group_by, *extra)


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
        return f"**{self.title}**\n\n{table}\n\n{self.caption}".rstrip()


@dataclass(frozen=True)
class StudyTables:
    """The tables of a study and the commands that repeat its final runs."""

    accuracies: tuple[Table, ...]
    selection: Table | None
    commands: str

    @property
    def accuracy(self) -> Table:
        """The first of the tables of accuracies."""
        return self.accuracies[0]

    def to_markdown(self) -> str:
        parts = [table.to_markdown() for table in self.accuracies]
        if self.selection is not None:
            parts.append(self.selection.to_markdown())
        if self.commands:
            code = f"```bash\n{self.commands}\n```"
            if "\n" in self.commands:
                code = f"<details><summary>Commands</summary>\n\n{code}\n\n</details>"
            parts.append(code)
        return "\n\n".join(parts)


def lines_of(method: str) -> list[tuple[str, tuple[str, str]]]:
    """Labels and keys of a method's lines; a float run is read twice, as trained and rounded."""
    if method == "float":
        return [("float", AS_TRAINED), (PTQ, FROM_CODES)]
    return [(method_label(method), FROM_CODES)]


def best_keys(method: str) -> tuple[str, str]:
    """Keys of what a method trains for: float as trained, the others at their codes."""
    return lines_of(method)[0][1]


def by_seed(members: Sequence[Record], part: str, key: str) -> dict[int, float]:
    """A reading of these runs, in percent, where there is one."""
    readings = {record.seed: record.accuracy(part, key) for record in members}
    return {seed: value for seed, value in readings.items() if value is not None}


def flag_cell(members: Sequence[Record], flag: str) -> str:
    """A flag's value in a row of runs that are alike."""
    return value_text(members[0].value(flag)) if members else NOT_RUN


def spoken(flags: Sequence[str]) -> str:
    """`learning rate, ramp stop and width`."""
    words = [flag.replace("_", " ") for flag in flags]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def is_method(method: str, asked: str) -> bool:
    """Whether a record's method is the one asked for, by its name or with its own flag's value."""
    return asked in (method, name_of(method))


def partner(
    group: Group, groups: Mapping[Group, Sequence[Record]], group_by: Sequence[str], method: str
) -> Sequence[Record]:
    """That method's only group, or the one equal to `group` in all flags but the method."""
    at = tuple(group_by).index("method")
    known = {other: members for other, members in groups.items() if is_method(other[at], method)}
    if len(known) == 1:
        return next(iter(known.values()))
    for other, members in known.items():
        if all(a == b for i, (a, b) in enumerate(zip(group, other, strict=True)) if i != at):
            return members
    return []


def differing_settings(
    groups: Mapping[Group, Sequence[Record]], options: TableOptions, shown: Sequence[str]
) -> str:
    """A sentence on the flags in which methods of the same row otherwise differ; may be empty.

    Args:
      groups: the runs, by `options.groups`.
      shown: flags that have a column, of which the values need not be told.
    """
    own = {method.own_flag for method in METHODS.values()}
    at = options.groups.index("method")
    levels: dict[Group, list[Record]] = {}
    for group, members in groups.items():
        levels.setdefault((*group[:at], *group[at + 1 :]), []).append(members[0])
    firsts = [members[0] for members in groups.values()]
    flags = {flag for record in firsts for flag in record.config}
    told = []
    for flag in sorted(flags - {*options.ignore, *options.groups, *own}):
        if not any(
            len(distinct(r.value(flag) for r in level if r.reads(flag))) > 1
            for level in levels.values()
        ):
            continue
        if flag in shown:
            told.append(f"{flag.replace('_', ' ')} (in its column)")
            continue
        methods: dict[str, list[str]] = {}
        for record in firsts:
            if record.reads(flag):
                methods.setdefault(value_text(record.value(flag)), []).append(record.method)
        told.append(f"{flag.replace('_', ' ')} {_values_of_methods(methods)}")
    if not told:
        return ""
    dash = f" {NO_VALUE}: the method does not read it." if _has_unread(firsts, shown) else ""
    return f"What differs between methods: {'; '.join(told)}.{dash}"


def _values_of_methods(methods: Mapping[str, Sequence[str]]) -> str:
    """`0.1 (float), 0.05 (STE, soft STE), 0.2 (the others)`, from the methods of each value."""
    names = {value: list(dict.fromkeys(found)) for value, found in methods.items()}
    listed = [name for found in names.values() for name in found]
    most = max(names, key=lambda value: len(names[value]))
    # "The others" is right only where no method has two values, one a level.
    shortened = len(names[most]) > 3 and len(listed) == len(set(listed))
    told = [
        f"{value} ({', '.join(map(method_label, found))})"
        for value, found in names.items()
        if not (shortened and value == most)
    ]
    return ", ".join([*told, *([f"{most} (the others)"] if shortened else [])])


def _has_unread(records: Sequence[Record], shown: Sequence[str]) -> bool:
    return any(not record.reads(flag) for record in records for flag in shown)
