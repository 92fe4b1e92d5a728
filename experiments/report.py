"""Run records -> tables as Markdown, plots as PNG, and one self-contained HTML page.

    python -m experiments.report results/binarynet_cifar10 --readme=README.md

writes `table.md`, the plots and `report.html` into the first directory (or --out), and renews the
block of the README that stands between the lines `<!-- table: binarynet_cifar10 -->` and
`<!-- /table: binarynet_cifar10 -->`. Options other than the defaults are noted in the first of
them, so that the table can be checked against the records. Without directories,

    python -m experiments.report --readme=README.md

renews whatever a marker in that file says how to make from results/: tables of runs, with the
options that the marker holds (a name may be several directories by comma), tables of benchmarks,
and numbers in sentences.

    <!-- table: study/final,study/ramps ablation=final/ -->
    <!-- benchmark: benchmarks.step.table bench_step/batch32 bench_step/batch128 -->
    <!-- number: mean study/final/ab_* digits=1 -->

`readme_blocks.py`, `benchmark_blocks.py` and `numbers_in_prose.py` in `reporting` have the words of
each. Tables of runs have these options:

    --tuned=learning_rate,ramp_stop     what trials chose for each method: their table, and columns
    --columns=quantizer:binary,int3     methods over levels, "not run" where there is no record
    --ablation=final/ste_,final/ab_     what single changes to the runs so named make of them
    --epochs=3,4                        the runs at these epochs, on validation images
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import tyro

from ab_jax.files import write_whole, writing
from experiments.reporting.figures import Plot, render_plots
from experiments.reporting.page import render_page
from experiments.reporting.panels import panels
from experiments.reporting.readme_blocks import block_text, parse_options, renew_all, renew_readme
from experiments.reporting.run_records import Record, ReportError, read_records
from experiments.reporting.study_tables import study_tables
from experiments.reporting.table_parts import StudyTables, TableOptions

DEFAULTS = TableOptions()


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to report, and where to."""

    # directories of records (searched for *.json), or single records
    records: tyro.conf.Positional[tuple[Path, ...]] = ()
    out: Path | None = None  # directory for the files written; default: the first one of records
    title: str | None = None  # heading of the page; default: the name of the first directory
    group_by: str = ",".join(DEFAULTS.group_by)  # flags that make a row, by comma
    baseline: str = DEFAULTS.baseline  # method that the others are compared with
    ignore: str = ",".join(DEFAULTS.ignore)  # flags that may differ within a row, by comma
    # flags that trials chose for each method, by comma; the first one's values are columns
    tuned: str = ",".join(DEFAULTS.tuned)
    # a table over methods and the values of this flag, as quantizer or quantizer:binary,ternary
    columns: str = DEFAULTS.columns
    # a table of single changes to the runs whose names begin so, as final/ste_,final/ab_
    ablation: str = DEFAULTS.ablation
    epochs: str = ",".join(DEFAULTS.epochs)  # a table of the runs at these epochs, by comma
    # file whose block `<!-- table: DIRECTORY -->` is renewed; without directories: all of it
    readme: Path | None = None
    results: Path = Path("results")  # where the records of a file's blocks and numbers are


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
    tables = study_tables(records, options)
    plots = [
        plot
        for panel in panels(records, options)
        for plot in render_plots(panel.series, panel.name, panel.title, panel.kinds)
    ]
    return tables, plots


def write_file(path: Path, data: bytes) -> None:
    """As `write_whole`, and the directories above it are made."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


def run(config: Config) -> Path:
    """Read the records, write the report and the README's table.

    Returns the page's path; the README's, where that is all that is written.
    """
    if not config.records and config.readme is not None:
        text = renew_all(_read_readme(config.readme), config.results)
        write_file(config.readme, text.encode())
        return config.readme
    if not config.records:
        raise ReportError("name at least one directory of records, or a file by --readme")
    options = parse_options({f.name: getattr(config, f.name) for f in fields(TableOptions)})
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
        text = _read_readme(config.readme)
        new = renew_readme(text, study, block_text(study, tables, first.parent), options)
        written[config.readme] = new.encode()
    for path, data in written.items():
        write_file(path, data)
    return out / "report.html"


def _read_readme(path: Path) -> str:
    if not path.is_file():
        raise ReportError(f"--readme={path} does not exist")
    return path.read_text(encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    config = tyro.cli(
        Config,
        prog="python -m experiments.report",
        args=list(argv),
        use_underscores=True,
        description=__doc__,
    )
    try:
        print(run(config))
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
