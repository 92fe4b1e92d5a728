"""A study as one HTML file: tables, plots and runs, with nothing to be loaded from elsewhere."""

import base64
import html
import re
from collections.abc import Sequence

from experiments.reporting.figures import Plot
from experiments.reporting.run_records import Record, method_label
from experiments.reporting.table_notes import short_revision
from experiments.reporting.table_parts import StudyTables, Table

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --faint: #666; --line: #d9d9d9;
        --shade: #f5f6f7; --link: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e6e8; --faint: #a0a6ad; --line: #3a3f45; --shade: #1f2429;
          --link: #5bb8f5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper);
       color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
/* As wide as the window, where a table wants it; narrower windows scroll. */
.wide { overflow-x: auto; width: max-content; min-width: 100%; max-width: calc(100vw - 2rem);
        position: relative; left: 50%; transform: translateX(-50%); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; border-bottom-width: 2px; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
                                 background: var(--paper); padding-left: 0; }
.accuracy th { white-space: normal; }
.accuracy td:first-child { white-space: normal; min-width: 7rem; }
.caption, figcaption { color: var(--faint); font-size: .88rem; max-width: 48rem;
                       margin: .6rem 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 44rem; height: auto; }
code, pre { font-family: ui-monospace, monospace; font-size: .85em; }
pre { overflow-x: auto; background: var(--shade); padding: .8rem; border-radius: .4rem; }
summary { cursor: pointer; color: var(--link); margin: 1rem 0 .5rem; }
"""


def render_page(
    title: str, tables: StudyTables, plots: Sequence[Plot], records: Sequence[Record]
) -> str:
    """The page's HTML; light or dark as the reader's device prefers."""
    parts = [_table(table, "accuracy") for table in tables.accuracies]
    if tables.commands:
        parts.append(_details("Commands", f"<pre>{html.escape(tables.commands)}</pre>"))
    if tables.selection is not None:
        parts.append(_table(tables.selection, "selection"))
    parts += [_figure(plot) for plot in plots]
    parts.append(_details(f"All runs ({len(records)})", _cells(_runs(records), "runs")))
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
"""


def _runs(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        seconds = record.summary.get("seconds")
        rows.append(
            (
                record.name,
                method_label(record.method),
                str(record.config.get("learning_rate", "")),
                str(record.seed),
                _percent(record.accuracy("validation", "quantized_recalibrated")),
                _percent(record.accuracy("test", "quantized_recalibrated")),
                "" if seconds is None else f"{seconds / 60:.1f}",
                f"`{short_revision(record.revision)}`",
            )
        )
    header = ("run", "method", "learning rate", "seed", "validation", "test", "minutes", "revision")
    caption = "Accuracies in percent, from the codes, batch-norm statistics re-estimated."
    return Table("Runs", header, tuple(rows), caption)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(table: Table, name: str) -> str:
    return f"<h2>{_inline(table.title)}</h2>\n{_cells(table, name)}"


def _cells(table: Table, name: str) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.header)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return (
        f'<div class="wide"><table class="{name}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>\n"
        f'<p class="caption">{_inline(table.caption)}</p>'
    )


def _figure(plot: Plot) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(image).decode()}"
        for image in (plot.light, plot.dark)
    )
    return (
        f"<h2>{html.escape(plot.title)}</h2>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(plot.title)}"></picture>'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
    )


def _details(summary: str, inner: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>\n{inner}\n</details>"


def _inline(markdown: str) -> str:
    text = html.escape(markdown)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
