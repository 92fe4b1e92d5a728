"""The marked blocks of a README or a page of docs, in which tables of records stand.

    <!-- table: binarynet_cifar10 baseline=ab -->
    ...
    <!-- /table: binarynet_cifar10 -->

The name is that of a directory in results/, or several by comma; what follows are the options that
are not the defaults. So a block says all that is needed to make its table anew.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from experiments.reporting.benchmark_blocks import has_benchmarks, renew_benchmarks
from experiments.reporting.numbers_in_prose import has_numbers, renew_numbers
from experiments.reporting.run_records import ReportError, read_records
from experiments.reporting.study_tables import study_tables
from experiments.reporting.table_parts import StudyTables, TableOptions

DEFAULTS = TableOptions()
_START = r"<!-- table: (\S+)((?: \w+=\S+)*) -->\n"


@dataclass(frozen=True)
class ReadmeBlock:
    """A marked block of a README: the study's name, the table's options, the text between."""

    study: str
    options: TableOptions
    text: str

    def table(self, results: Path) -> str:
        """What should stand there by the records in `results`. Raises ReportError."""
        records = read_records([results / study for study in self.study.split(",")])
        return block_text(self.study, study_tables(records, self.options), results)


def block_text(name: str, tables: StudyTables, results: Path) -> str:
    """What stands between the markers of a block: the tables, and the command that repeats them.

    Args:
      name: the block's name, of a directory in `results`, or several by comma.
      results: the directory of all records; studies/ lies beside it.
    """
    studies = dict.fromkeys(part.partition("/")[0] for part in name.split(","))
    files = [f"studies/{study}.toml" for study in studies]
    if all((results.resolve().parent / file).exists() for file in files):
        lines = [f"python -m experiments.study {file} --jobs=2" for file in files]
        tables = replace(tables, commands="\n".join(lines))
    return tables.to_markdown()


def readme_blocks(text: str) -> list[ReadmeBlock]:
    """The marked blocks of a README. Raises ReportError for one that is not closed."""
    return [block for block, _, _ in _placed_blocks(text)]


def renew_readme(text: str, study: str, table: str, options: TableOptions = DEFAULTS) -> str:
    """`text` with the block of `study` replaced by `table`, its marker by one of these options.

    Of several blocks of a study it is the one whose options are these. Raises ReportError where
    there is none.
    """
    placed = [found for found in _placed_blocks(text) if found[0].study == study]
    if not placed:
        raise ReportError(
            f"there is no block for {study}: add the lines\n"
            f"<!-- table: {study} -->\n<!-- /table: {study} -->\nwhere its table is to stand"
        )
    if len(placed) > 1:
        placed = [found for found in placed if found[0].options == options]
    if not placed:
        raise ReportError(
            f"there are several blocks for {study}, but none opens with\n"
            f"<!-- table: {study}{format_options(options)} -->\nadd it where the table is to stand"
        )
    return _replaced(text, [(start, stop, table, options) for _, start, stop in placed], study)


def renew_all(text: str, results: Path) -> str:
    """`text` with its tables, of studies and of benchmarks, and its numbers made anew.

    All is made from the records in `results`. Raises ReportError: a block or a number that cannot
    be made, by its marker; none at all.
    """
    placed = _placed_blocks(text)
    if not (placed or has_benchmarks(text) or has_numbers(text)):
        raise ReportError("there is no block: add a line <!-- table: STUDY --> and its end")
    for block, start, stop in reversed(placed):
        try:
            table = block.table(results)
        except ReportError as error:
            raise ReportError(f"the block of {block.study}: {error}") from error
        text = _replaced(text, [(start, stop, table, block.options)], block.study)
    return renew_numbers(renew_benchmarks(text, results), results)


def _placed_blocks(text: str) -> list[tuple[ReadmeBlock, int, int]]:
    """The blocks, and where each begins and ends, its markers included."""
    placed = []
    for start in re.finditer(_START, text):
        end = f"\n<!-- /table: {start[1]} -->"
        stop = text.find(end, start.end() - 1)
        if stop < 0:
            raise ReportError(f"the block of {start[1]} is not closed: add a line{end}")
        options = parse_options(dict(word.split("=", 1) for word in start[2].split()))
        block = ReadmeBlock(start[1], options, text[start.end() : max(start.end(), stop)])
        placed.append((block, start.start(), stop + len(end)))
    return placed


def _replaced(text: str, blocks: Sequence[tuple[int, int, str, TableOptions]], study: str) -> str:
    for start, stop, table, options in reversed(blocks):
        opened = f"<!-- table: {study}{format_options(options)} -->"
        text = f"{text[:start]}{opened}\n{table}\n<!-- /table: {study} -->{text[stop:]}"
    return text


def parse_options(words: Mapping[str, str]) -> TableOptions:
    """Options from words as a marker and the command line hold them, lists by comma.

    Raises ReportError for an option that there is not.
    """
    known = {field.name for field in fields(TableOptions)}
    if unknown := words.keys() - known:
        raise ReportError(
            f"a table's marker holds {', '.join(sorted(unknown))}; "
            f"it may hold: {', '.join(sorted(known))}"
        )
    values: dict[str, Any] = {
        name: word
        if isinstance(getattr(DEFAULTS, name), str)
        else tuple(filter(None, word.split(",")))
        for name, word in words.items()
    }
    return TableOptions(**values)


def format_options(options: TableOptions) -> str:
    """Those that are not the defaults, as `parse_options` takes them, each after a space."""
    words = ""
    for field in fields(TableOptions):
        value = getattr(options, field.name)
        if value != getattr(DEFAULTS, field.name):
            words += f" {field.name}={value if isinstance(value, str) else ','.join(value)}"
    return words
