"""Numbers in the sentences of a page, made from records as its tables are.

    AB minus STE is <!-- number: difference binarynet_methods/final/{ab,ste}_lr*
    -->+0.08 [-0.18, +0.34]<!-- /number --> points.

A marker, which a reader of the rendered page does not see, holds words, on as many lines as wanted:

- a function, by which the number is made of values: one of `FUNCTIONS`;
- the groups of records that it takes, each a pattern of files in results/, without `.json`;
  `{ab,ste}` makes two groups of one word, as in a shell;
- options, as `name=value`: `of=` says what the values are, a quantity of `quantities` (if left
  out: accuracy), whose own options may follow; `digits=` is how many stand behind the point.
  `statistics=both` is the number with running and with re-estimated statistics, `14.7 / 14.0`.
  A value that has spaces stands in quotes.
"""

import glob
import inspect
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.reporting.paired_statistics import (
    difference_cell,
    mean_cell,
    paired_difference,
    signed,
)
from experiments.reporting.quantities import OF_BENCHMARKS, OF_RUNS, known
from experiments.reporting.run_records import Record, ReportError, group_records, read_records
from experiments.reporting.table_parts import STATISTICS, TableOptions

_MARKER = re.compile(r"<!--\s*number:(.*?)-->(?:([^<]*)<!--\s*/number\s*-->)?", re.DOTALL)


def renew_numbers(text: str, results: Path) -> str:
    """`text` with every marked number made anew from the records in `results`.

    A number that is right is left as it stands, broken over two lines if it is. Raises ReportError
    for a marker that is not closed, that begins a line, or of whose words no number can be made.
    """

    def renewed(marker: re.Match[str]) -> str:
        try:
            _check_place(marker)
            number = number_of(marker[1], results)
        except ReportError as error:
            words = " ".join(marker[1].split())
            raise ReportError(f"<!-- number: {words} -->: {error}") from error
        if marker[2].split() == number.split():
            return marker[0]
        start, stop = (place - marker.start() for place in marker.span(2))
        return f"{marker[0][:start]}{number}{marker[0][stop:]}"

    return _MARKER.sub(renewed, text)


def has_numbers(text: str) -> bool:
    """Whether there is a marker in a page."""
    return _MARKER.search(text) is not None


def _check_place(marker: re.Match[str]) -> None:
    if marker[2] is None:
        raise ReportError("it is not closed: add <!-- /number --> behind the number")
    *_, before = marker.string[: marker.start()].split("\n")
    if re.fullmatch(r"[\s>]*([-*+]|\d+[.)])?\s*", before):
        raise ReportError(
            "it begins its line, where Markdown takes a comment for the end of the paragraph: put "
            "the word before it on the same line"
        )


def number_of(marker: str, results: Path) -> str:
    """What the words of a marker stand for, by the records in `results`. Raises ReportError."""
    try:
        words = shlex.split(marker)
    except ValueError as error:
        raise ReportError(f"its quotes: {error}") from None
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if options.get("statistics") == "both":
        each = (shlex.join([*words, f"statistics={one}"]) for one in STATISTICS)  # the last counts
        return " / ".join(number_of(one, results) for one in each)
    name, *patterns = [word for word in words if "=" not in word] or [""]
    function = FUNCTIONS[known("function", name, FUNCTIONS)]
    of = known("of", options.pop("of", "accuracy"), (*OF_RUNS, *OF_BENCHMARKS))
    shown = {}
    if "digits" in options:
        shown = {"digits": int(known("digits", options.pop("digits"), tuple("0123456")))}
    groups = [
        read_group(one, results, of, options)
        for pattern in patterns
        for one in _spelled_out(pattern)
    ]
    _check_call(name, function, *groups, **shown)
    return function(*groups, **shown)


def _spelled_out(pattern: str) -> list[str]:
    """`final/{ab,ste}_*` as `final/ab_*` and `final/ste_*`."""
    before, brace, rest = pattern.partition("{")
    inside, _, after = rest.partition("}")
    return [f"{before}{one}{after}" for one in inside.split(",")] if brace else [pattern]


def _check_call(name: str, function: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Raises ReportError where the function does not take these arguments."""
    signature = inspect.signature(function)
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        options_of = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        told = ", ".join(options_of) or "none"
        raise ReportError(f"{name}: {error}; its options are: {told}") from None


@dataclass(frozen=True)
class Group:
    """The values of the records that match a pattern; `runs` are none for benchmarks."""

    pattern: str
    values: Sequence[float]
    runs: Sequence[Record]

    @property
    def by_seed(self) -> dict[int, float]:
        """The values of runs that differ by their seed alone. Raises ReportError for others."""
        alike = group_records(self.runs, ("method",), TableOptions().ignore)
        if len(alike) != 1:
            methods = ", ".join(method for (method,) in alike) or "none"
            raise ReportError(f"{self.pattern} must be runs of one method, and is of: {methods}")
        return {run.seed: value for run, value in zip(self.runs, self.values, strict=True)}


def read_group(pattern: str, results: Path, of: str, options: Mapping[str, str]) -> Group:
    """What the records that match a pattern say. Raises ReportError where that is nothing."""
    files = sorted(glob.glob(f"{pattern}.json", root_dir=results))
    if not files:
        raise ReportError(f"there is no record {pattern}.json in {results}")
    paths = [results / file for file in files]
    runs = read_records(paths) if of in OF_RUNS else []
    values: list[float] = []
    try:
        for run in runs:
            _check_call(f"of={of}", OF_RUNS[of], run, **options)
            values.append(OF_RUNS[of](run, **options))
        for path in [] if of in OF_RUNS else paths:
            benchmark = json.loads(path.read_text(encoding="utf-8"))
            _check_call(f"of={of}", OF_BENCHMARKS[of], benchmark, **options)
            values += OF_BENCHMARKS[of](benchmark, **options)
    except (KeyError, ValueError) as error:
        raise ReportError(f"of={of} cannot be read from {pattern}: it has no {error}") from error
    if not values:
        raise ReportError(f"of={of}: {pattern} has nothing that these options ask for")
    return Group(pattern, values, runs)


# The functions, by the name that a marker calls them


def difference(group: Group, baseline: Group, *, digits: int = 2) -> str:
    """`+0.08 [-0.18, +0.34]`: the first minus the second, paired by seed, with its interval."""
    return difference_cell(group.by_seed, baseline.by_seed, digits)


def mean_difference(group: Group, baseline: Group, *, digits: int = 2) -> str:
    """`+0.08`: the same without its interval."""
    return signed(_mean_difference(group, baseline), digits)


def gap(group: Group, baseline: Group, *, digits: int = 2) -> str:
    """`0.08`: the same where the sentence says which is above; below 0 the sentence is wrong."""
    return f"{_mean_difference(group, baseline):z.{digits}f}"


def mean(group: Group, *, digits: int = 2) -> str:
    """`66.53`: over seeds."""
    return f"{fmean(group.by_seed.values()):z.{digits}f}"


def mean_and_deviation(group: Group, *, digits: int = 2) -> str:
    """`66.53 ± 0.41`: over seeds, with the sample standard deviation."""
    return mean_cell(list(group.by_seed.values()), len(group.runs), digits)


def lowest(*groups: Group, digits: int = 2) -> str:
    """The smallest of all values, whatever the records differ in."""
    return f"{min(_all_values(groups)):z.{digits}f}"


def highest(*groups: Group, digits: int = 2) -> str:
    """The largest of all values, whatever the records differ in."""
    return f"{max(_all_values(groups)):z.{digits}f}"


def value_range(*groups: Group, digits: int = 2) -> str:
    """`4.21 to 6.98`: from the smallest to the largest of all values."""
    return f"{lowest(*groups, digits=digits)} to {highest(*groups, digits=digits)}"


def shared(*groups: Group) -> str:
    """`0.2`: the one value that all of them have, such as a learning rate."""
    found = sorted({f"{value:g}" for value in _all_values(groups)})
    if len(found) > 1:
        raise ReportError(f"shared: there are several values, {', '.join(found)}")
    return found[0]


def _all_values(groups: Sequence[Group]) -> list[float]:
    if not groups:
        raise ReportError("name records behind the function")
    return [value for group in groups for value in group.values]


def _mean_difference(group: Group, baseline: Group) -> float:
    found = paired_difference(group.by_seed, baseline.by_seed)
    if found is None:
        raise ReportError(f"{group.pattern} and {baseline.pattern} share no seed")
    return found.mean


FUNCTIONS: dict[str, Callable[..., str]] = {
    "difference": difference,
    "mean_difference": mean_difference,
    "gap": gap,
    "mean": mean,
    "mean_and_deviation": mean_and_deviation,
    "lowest": lowest,
    "highest": highest,
    "range": value_range,
    "shared": shared,
}
