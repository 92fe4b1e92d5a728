"""The blocks of a page in which tables of benchmarks stand.

    <!-- benchmark: benchmarks.step.table bench_step/batch32 bench_step/batch128 -->
    ...
    <!-- /benchmark -->

The words are a function, with its module, which makes the text from a list of records, and these
records, as files in results/ without `.json`; with `*` in it a name stands for all that there are,
sorted.
"""

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.reporting.run_records import ReportError

_START = re.compile(r"<!-- benchmark: ([^\n]*) -->\n")
_END = "<!-- /benchmark -->"


def has_benchmarks(text: str) -> bool:
    """Whether a page has such a block."""
    return _START.search(text) is not None


def renew_benchmarks(text: str, results: Path) -> str:
    """`text` with every block made anew from its records in `results`.

    Raises ReportError, which names the block: one that is not closed, or cannot be made.
    """
    before, *blocks = _START.split(text)  # what is before; words, what follows; words, ...
    renewed = before
    for words, following in zip(blocks[::2], blocks[1::2], strict=True):
        start = f"<!-- benchmark: {words} -->\n"
        _, end, after = following.partition(_END)
        try:
            if not end:
                raise ReportError(f"it is not closed: add a line {_END}")
            function, *records = words.split() or [""]
            made = benchmark_table(function, records, results)
        except ReportError as error:
            raise ReportError(f"{start.rstrip()}: {error}") from error
        renewed += f"{start}{made}\n{_END}{after}"
    return renewed


def benchmark_table(function: str, names: Sequence[str], results: Path) -> str:
    """What a function such as `benchmarks.step.table` makes of the records so named.

    Raises ReportError: no such function, no such record, records of something else.
    """
    module, _, name = function.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # the last: no module is named
        raise ReportError(f"{function or 'no function'} cannot be had: {error}") from error
    records: list[dict[str, Any]] = []
    for path in (path for one in names for path in _paths(one, results)):
        if not path.is_file():
            raise ReportError(f"there is no record {path}")
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ReportError(f"{path} is not JSON: {error}") from error
    try:
        return str(make(records))
    except (KeyError, IndexError, TypeError) as error:
        told = ", ".join(names) or "no record"
        raise ReportError(f"{function} makes no table of {told}: {error!r}") from error


def _paths(name: str, results: Path) -> list[Path]:
    """The files of a name.

    Raises ReportError: a pattern that nothing matches.
    """
    if "*" not in name:
        return [results / f"{name}.json"]
    if not (found := sorted(results.glob(f"{name}.json"))):
        raise ReportError(f"there is no record {results / name}.json")
    return found
