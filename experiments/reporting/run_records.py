"""Run records read from disk, and grouped so that a group's runs differ by their seed alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.settings.methods import METHODS
from experiments.settings.old_flags import ADDED_LATER, todays

NO_VALUE = "–"  # what a table shows of a flag that a method does not read
_OWN = "/"  # between a method and the value of the flag that it alone reads
Group = tuple[Any, ...]


class ReportError(Exception):
    """The records cannot be reported as asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished run, as its `record.json` holds it.

    `metrics` has one mapping an evaluation; `summary` has the final readings, as fractions, under
    "validation" and "test", the latter None or absent when the test set was not read; `data` is
    what is known of the images, such as `classes` and `image_shape`. `added_later` is what today's
    summaries hold and those of the run's code did not.
    """

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    experiment: str = "unknown experiment"
    revision: str = "unknown"
    hardware: str = "unknown"
    packages: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    added_later: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def method(self) -> str:
        """The method, with the value of the flag that it alone reads: `ab_layerwise/forward`."""
        name = str(self.config["method"])
        flag = METHODS[name].own_flag if name in METHODS else None
        if flag is None or flag not in self.config:
            return name
        return f"{name}{_OWN}{value_text(self.config[flag])}"

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def is_final(self) -> bool:
        """Whether the test set was read; the other runs are trials, for choosing flags by."""
        return bool(self.summary.get("test"))

    def has(self, flag: str) -> bool:
        """Whether there is a value of this flag, in its config or from before the flag."""
        return flag in self.config or flag in ADDED_LATER

    def template(self, flag: str) -> Any:
        """A flag's value; `seed3` in its text becomes `seed{seed}`, so that runs that differ by
        their seed alone have equal ones."""
        value = self.config.get(flag, ADDED_LATER.get(flag))
        if isinstance(value, str):
            return value.replace(f"seed{self.seed}", "seed{seed}")
        return value

    def reads(self, flag: str) -> bool:
        """Whether a flag has a meaning for this run's method."""
        name = str(self.config["method"])
        return name not in METHODS or flag not in METHODS[name].unread

    def value(self, flag: str) -> Any:
        """What runs are grouped by: `method`, a flag's template, NO_VALUE where it is not read."""
        if flag == "method":
            return self.method
        return self.template(flag) if self.reads(flag) else NO_VALUE

    @property
    def size(self) -> tuple[int, int] | None:
        """Bytes of the parameters, as trained and with packed codes and their scales, if known.

        The means and variances of batch norm are not counted: they fold into its scale and shift,
        which are.
        """
        held = self._summed_up("bytes")
        return None if held is None else (int(held["trained"]), int(held["packed"]))

    @property
    def start(self) -> Mapping[str, float] | None:
        """The validation accuracies, as fractions, of the run that it went on from, if known."""
        return self._summed_up("start")

    def _summed_up(self, key: str) -> Any:
        return self.summary.get(key, self.added_later.get(key))

    def accuracy(self, part: str, key: str) -> float | None:
        """A final reading in percent, None where there is none; `part` is validation or test."""
        value = (self.summary.get(part) or {}).get(key)
        return None if value is None else 100 * float(value)


def read_records(paths: Iterable[Path | str]) -> list[Record]:
    """The records in files and, recursively, in directories, sorted by name.

    JSON files without "config" and "summary" are passed over; the same record found twice (in
    `runs/` and as a kept copy) counts once.

    Raises ReportError: a missing path, broken JSON, a record without a method or seed, two
    different records of one name.
    """
    records: dict[str, Record] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ReportError(f"{path} does not exist: name a directory of records, or a record")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            if (record := _read_record(file)) is None:
                continue
            other = records.setdefault(record.name, record)
            if (other.config, other.summary) != (record.config, record.summary):
                raise ReportError(
                    f"{other.path} and {file} are different runs named {record.name}: "
                    "remove one, or give each a --name of its own"
                )
    return [records[name] for name in sorted(records)]


def without_starts(records: Sequence[Record]) -> Sequence[Record]:
    """Those that no other of the records goes on from: a start is neither trial nor final run."""
    starts = {str(record.config.get("init_from")) for record in records}
    return [r for r in records if not any(start.endswith(f"/{r.name}") for start in starts)]


def _read_record(file: Path) -> Record | None:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{file} is not JSON ({error}): remove it, or run it again") from None
    if not isinstance(held, dict) or not {"config", "summary"} <= held.keys():
        return None
    if missing := {"method", "seed"} - held["config"].keys():
        raise ReportError(
            f"{file}: its config has no {' and no '.join(sorted(missing))}; a report compares "
            "methods over seeds, so leave this record out"
        )
    known = {"experiment", "config", "data", "summary", "metrics"}
    known |= {"revision", "hardware", "packages", "added_later"}
    fields = {key: held[key] for key in known & held.keys() if held[key] is not None}
    name = held.get("name") or held["config"].get("name") or file.stem
    fields["config"] = todays(held.get("experiment"), held["config"])
    return Record(name=name, path=file, **fields)


def group_records(
    records: Sequence[Record], group_by: Sequence[str], ignore: Sequence[str]
) -> dict[Group, list[Record]]:
    """Records by the values of the flags `group_by`, methods in the order of METHODS.

    Raises ReportError: a flag no config has; a group whose runs differ in a flag that is neither
    in `group_by` nor in `ignore`, since a mean over them would mean nothing; a seed run twice.
    A path that holds the run's own seed as `seed3` counts as equal.
    """
    groups: dict[Group, list[Record]] = {}
    for record in records:
        if missing := [flag for flag in group_by if not record.has(flag)]:
            raise ReportError(
                f"--group_by: {record.name} has no flag {', '.join(missing)}; "
                f"it has: {', '.join(sorted(record.config))}"
            )
        groups.setdefault(tuple(record.value(flag) for flag in group_by), []).append(record)
    for group, members in groups.items():
        where = ", ".join(f"{flag}={value}" for flag, value in zip(group_by, group, strict=True))
        _check_alike(where, members, ignore)
        check_seeds(where, members)
    return {group: sorted(groups[group], key=_seed) for group in sorted(groups, key=sort_key)}


def _check_alike(where: str, members: Sequence[Record], ignore: Sequence[str]) -> None:
    first = members[0]
    for record in members[1:]:
        for flag in sorted({*first.config, *record.config} - {*ignore}):
            if first.value(flag) != record.value(flag):
                raise ReportError(
                    f"the runs of {where} are not alike: {flag} is {first.config.get(flag)} in "
                    f"{first.name} and {record.config.get(flag)} in {record.name}; add {flag} to "
                    "--group_by, or to --ignore if it cannot change a result"
                )


def check_seeds(where: str, members: Sequence[Record]) -> None:
    """Raises ReportError where two of the runs have the same seed."""
    seen: dict[int, Record] = {}
    for record in members:
        other = seen.setdefault(record.seed, record)
        if other is not record:
            raise ReportError(
                f"seed {record.seed} of {where} was run twice, as {other.name} and {record.name}: "
                "report one of them"
            )


def _seed(record: Record) -> int:
    return record.seed


def sort_key(values: Iterable[Any]) -> list[tuple[int, float, str]]:
    """Orders flags' values: known methods first, as in METHODS, then numbers, then text."""
    order: list[str] = list(METHODS)
    key = []
    for value in values:
        if isinstance(value, str) and name_of(value) in order:
            key.append((0, float(order.index(name_of(value))), value))
        elif isinstance(value, int | float):
            key.append((1, float(value), ""))
        else:
            key.append((2, 0.0, str(value)))
    return key


def method_label(method: str) -> str:
    """A method's name in tables and plots; `method` is that of a `Record`, or a flag's value."""
    name, _, value = method.partition(_OWN)
    if name not in METHODS:  # from elsewhere: package.module:NAME
        return name.rpartition(":")[2]
    label = METHODS[name].label
    return label + METHODS[name].suffix.format(value) if value else label


def name_of(method: str) -> str:
    """The flag's value of a `Record`'s method."""
    return method.partition(_OWN)[0]


def value_text(value: Any) -> str:
    """A flag's value in a table."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def distinct(values: Iterable[Any]) -> list[Any]:
    """The different ones among the values, in order; they may be lists."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return sorted(found, key=lambda value: sort_key([value]))
