"""Run records -> tables as Markdown, plots as PNG, and one self-contained HTML page.

    python -m experiments.report results/binarynet_cifar10 --readme=README.md

writes `table.md`, `accuracy.png`, `changed_codes.png`, `weights.png` and `report.html` into the
first directory (or --out), and renews the block of the README that stands between the lines
`<!-- table: binarynet_cifar10 -->` and `<!-- /table: binarynet_cifar10 -->`. Options other than
the defaults are noted in the first of them, so that the table can be checked against the records.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import tyro

from experiments.reporting.figures import Plot, Series, label_of, render_plots
from experiments.reporting.page import render_page
from experiments.reporting.readings import Record, ReportError, group_records, read_records
from experiments.reporting.tables import StudyTables, TableOptions, study_tables

DEFAULTS = TableOptions()


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to report, and where to."""

    # directories of records (searched for *.json), or single records
    records: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None  # directory for the files written; default: the first one of records
    title: str | None = None  # heading of the page; default: the name of the first directory
    group_by: str = ",".join(DEFAULTS.group_by)  # flags that make a row, by comma
    baseline: str = DEFAULTS.baseline  # method that the others are compared with
    ignore: str = ",".join(DEFAULTS.ignore)  # flags that may differ within a row, by comma
    readme: Path | None = None  # file whose block `<!-- table: DIRECTORY -->` is renewed


@dataclass(frozen=True)
class ReadmeBlock:
    """A marked block of a README: the study's name, the table's options, the text between."""

    study: str
    options: TableOptions
    text: str


def write_report(
    records: Sequence[Record],
    out_dir: Path | str,
    *,
    title: str = "Report",
    options: TableOptions = DEFAULTS,
) -> Path:
    """Write `report.html` to `out_dir`, one file with tables and plots inside; returns its path.

    Raises ReportError where there is no record, or a row would mix unlike runs.
    """
    tables, plots = report_parts(records, options)
    path = Path(out_dir) / "report.html"
    write_file(path, render_page(title, tables, plots, records).encode())
    return path


def report_parts(
    records: Sequence[Record], options: TableOptions = DEFAULTS
) -> tuple[StudyTables, list[Plot]]:
    """The tables and the plots of a report."""
    if not records:
        raise ReportError("there is no record to report")
    return study_tables(records, options), render_plots(_series(records, options))


def _series(records: Sequence[Record], options: TableOptions) -> list[Series]:
    """The lines of the plots: the final runs' groups, or the trials' where there are no others."""
    finals = [record for record in records if record.is_final]
    flags = options.group_by
    if not finals and "learning_rate" not in flags:
        flags = (*flags, "learning_rate")
    flags = tuple(flag for flag in flags if all(flag in r.config for r in finals or records))
    series = []
    for group, members in group_records(finals or records, flags, options.ignore).items():
        others = dict(zip(flags, group, strict=True))
        method = others.pop("method")
        series.append(Series(label_of(method, others), method, members))
    return series


def readme_blocks(text: str) -> list[ReadmeBlock]:
    """The marked blocks of a README. Raises ReportError for one that is not closed."""
    blocks = []
    for start in re.finditer(r"<!-- table: (\S+)((?: \w+=\S+)*) -->\n", text):
        end = f"\n<!-- /table: {start[1]} -->"
        stop = text.find(end, start.end() - 1)
        if stop < 0:
            raise ReportError(f"the block of {start[1]} is not closed: add a line{end}")
        options = _parse_options(dict(word.split("=", 1) for word in start[2].split()))
        blocks.append(ReadmeBlock(start[1], options, text[start.end() : max(start.end(), stop)]))
    return blocks


def renew_readme(text: str, study: str, table: str, options: TableOptions = DEFAULTS) -> str:
    """`text` with the block of `study` replaced by `table`. Raises ReportError without markers."""
    if study not in [block.study for block in readme_blocks(text)]:
        raise ReportError(
            f"there is no block for {study}: add the lines\n"
            f"<!-- table: {study} -->\n<!-- /table: {study} -->\nwhere its table is to stand"
        )
    name = re.escape(study)
    block = rf"<!-- table: {name}(?: \w+=\S+)* -->\n.*?<!-- /table: {name} -->"
    marked = f"<!-- table: {study}{_format_options(options)} -->\n{table}\n<!-- /table: {study} -->"
    return re.sub(block, lambda _: marked, text, flags=re.DOTALL)


def _parse_options(words: dict[str, str]) -> TableOptions:
    known = {field.name for field in fields(TableOptions)}
    if unknown := words.keys() - known:
        raise ReportError(
            f"a table's marker holds {', '.join(sorted(unknown))}; "
            f"it may hold: {', '.join(sorted(known))}"
        )
    return TableOptions(
        group_by=tuple(words["group_by"].split(",")) if "group_by" in words else DEFAULTS.group_by,
        baseline=words.get("baseline", DEFAULTS.baseline),
        ignore=tuple(words["ignore"].split(",")) if "ignore" in words else DEFAULTS.ignore,
    )


def _format_options(options: TableOptions) -> str:
    words = ""
    for field in fields(TableOptions):
        value = getattr(options, field.name)
        if value != getattr(DEFAULTS, field.name):
            words += f" {field.name}={value if isinstance(value, str) else ','.join(value)}"
    return words


def write_file(path: Path, data: bytes) -> None:
    """Write so that `path` is at any time absent, the old file, or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def run(config: Config) -> Path:
    """Read the records, write the report and the README's table; returns the page's path."""
    if not config.records:
        raise ReportError("name at least one directory of records")
    options = TableOptions(
        group_by=tuple(config.group_by.split(",")),
        baseline=config.baseline,
        ignore=tuple(config.ignore.split(",")),
    )
    records = read_records(config.records)
    if not records:
        raise ReportError(f"there is no record in {', '.join(map(str, config.records))}")
    first = config.records[0]
    study = first.resolve().name
    tables, plots = report_parts(records, options)
    files = {"table.md": f"{tables.to_markdown()}\n".encode()}
    files |= {f"{plot.name}.png": plot.light for plot in plots}
    page = render_page(config.title or study, tables, plots, records)
    files["report.html"] = page.encode()
    out = config.out or (first if first.is_dir() else first.parent)
    written = {out / name: data for name, data in files.items()}
    if config.readme is not None:
        # The table is checked against results/STUDY, so it must come from there alone.
        if len(config.records) != 1 or not first.is_dir():
            raise ReportError("--readme needs one directory of records: its name is the study's")
        if not config.readme.is_file():
            raise ReportError(f"--readme={config.readme} does not exist")
        text = config.readme.read_text(encoding="utf-8")
        new = renew_readme(text, study, tables.to_markdown(), options)
        written[config.readme] = new.encode()
    for path, data in written.items():
        write_file(path, data)
    return out / "report.html"


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    config = tyro.cli(Config, args=list(argv), use_underscores=True, description=__doc__)
    try:
        print(run(config))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
