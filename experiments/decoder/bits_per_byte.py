"""The decoder's tables, in bits per byte, from its records.

    python -m experiments.decoder.bits_per_byte results/decoder_text
    python -m experiments.decoder.bits_per_byte results/decoder_text --page=docs/frameworks.md

The second writes them between the page's markers, <!-- decoder_text --> and <!-- /decoder_text -->.
The tables of `experiments.report` are of accuracies, in percent, and read with two kinds of
batch-norm statistics; here a smaller number is a better one, and there is no batch norm. Records,
labels and pairing by seed are the same.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

from ab_jax.files import write_whole
from experiments.reporting.paired_statistics import (
    NOT_RUN,
    mean_and_deviation,
    paired_difference,
)
from experiments.reporting.run_records import (
    Record,
    ReportError,
    distinct,
    group_records,
    method_label,
    read_records,
    value_text,
)
from experiments.reporting.table_notes import provenance
from experiments.reporting.table_parts import PTQ, Table
from experiments.settings.config import FREE_FLAGS

NONE_YET = "Not run yet."
IGNORED = ("seed", "read_test", *sorted(FREE_FLAGS))
_BLOCK = re.compile(r"(<!-- decoder_text -->\n).*?(\n?<!-- /decoder_text -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Print the tables, or write them into a page."""

    records: tyro.conf.Positional[Path]  # directory of the records
    page: Path | None = None  # write them between this page's markers


def tables(records: Sequence[Record]) -> str:
    """Final runs on test text and trials on validation text, as Markdown.

    Raises ReportError: runs of a row that differ in more than the seed.
    """
    final = [record for record in records if record.is_final]
    trials = [record for record in records if not record.is_final]
    made = [*([_final(final)] if final else []), *([_trials(trials)] if trials else [])]
    return "\n\n".join(table.to_markdown() for table in made) or NONE_YET


def renewed(page: str, text: str) -> str:
    """The page with `text` between its markers. Raises ReportError where there are none."""
    if not _BLOCK.search(page):
        raise ReportError("the page has no lines <!-- decoder_text --> and <!-- /decoder_text -->")
    return _BLOCK.sub(lambda found: f"{found[1]}{text}\n<!-- /decoder_text -->", page)


def _final(records: Sequence[Record]) -> Table:
    groups = group_records(records, ("method", "learning_rate"), IGNORED)
    readings: dict[str, tuple[str, dict[int, float]]] = {}
    for (method, rate), members in groups.items():
        lines = (
            {method: "quantized"} if method != "float" else {"float": "blended", PTQ: "quantized"}
        )
        for line, key in lines.items():
            if line in readings:
                raise ReportError(f"the final runs of {method_label(line)} have several rates")
            readings[line] = value_text(rate), _by_seed(members, "test", key)
    rows = []
    for line, (rate, values) in readings.items():
        others = [_difference(line, values, name, readings) for name in ("ste", "float")]
        rows.append((method_label(line), rate, str(len(values)), _mean(values), *others))
    unigram = distinct(record.data.get("unigram_bits_per_byte") for record in records)
    known = " or ".join(f"{value:.2f}" for value in unigram if value is not None)
    caption = (
        "Smaller is better. Mean ± sample standard deviation over n seeds, from the integer codes "
        "(float: from the weights as trained), on test text that nothing was chosen by. "
        "Differences are paired by seed; in brackets the 95 % confidence interval of their mean (t "
        f"distribution). {f'A byte costs {known} bits by its frequency alone. ' if known else ''}"
        f"{_of_text(records)}{provenance(records)}"
    )
    header = ("method", "learning rate", "n", "bits per byte", "minus STE", "minus float")
    return Table("Test text (bits per byte)", header, tuple(rows), caption)


def _trials(records: Sequence[Record]) -> Table:
    groups = group_records(records, ("method", "learning_rate"), IGNORED)
    rates = distinct(rate for _, rate in groups)
    rows = []
    for method in distinct(method for method, _ in groups):
        key = "blended" if method == "float" else "quantized"
        cells = {
            rate: _by_seed(groups[method, rate], "validation", key)
            for rate in rates
            if (method, rate) in groups
        }
        best = min(cells, key=lambda rate: mean_and_deviation(list(cells[rate].values()))[0])
        row = [method_label(method)]
        for rate in rates:
            text = _mean(cells[rate]) if rate in cells else NOT_RUN
            row.append(f"**{text}**" if rate == best else text)
        rows.append((*row, str(sum(map(len, cells.values())))))
    header = ("method", *(f"rate {value_text(rate)}" for rate in rates), "trials")
    caption = (
        "Runs that did not read the test text. In bold the best rate of each method, which its "
        f"final runs take. {provenance(records)}"
    )
    title = "Validation text (bits per byte), by learning rate"
    return Table(title, header, tuple(rows), caption)


def _by_seed(members: Sequence[Record], part: str, key: str) -> dict[int, float]:
    return {record.seed: float(record.summary[part][key]) for record in members}


def _mean(values: Mapping[int, float]) -> str:
    mean, deviation = mean_and_deviation(list(values.values()))
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _difference(
    line: str,
    values: Mapping[int, float],
    name: str,
    readings: Mapping[str, tuple[str, Mapping[int, float]]],
) -> str:
    if line == name:
        return "baseline"
    found = paired_difference(values, readings[name][1]) if name in readings else None
    if found is None:
        return NOT_RUN
    if found.half_width is None:
        return f"{found.mean:+.3f} (n = {found.n})"
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _of_text(records: Sequence[Record]) -> str:
    texts = distinct(str(record.data.get("sha256", "unknown"))[:10] for record in records)
    return f"SHA-256 of the text begins with {' or '.join(f'`{text}`' for text in texts)}. "


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    try:
        text = tables(read_records([config.records]))
        if config.page is None:
            print(text)
        else:
            page = config.page.read_text(encoding="utf-8")
            write_whole(config.page, renewed(page, text).encode())
    except (ReportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
