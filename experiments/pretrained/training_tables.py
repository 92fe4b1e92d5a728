"""Tables of a study of short training after calibration, from the records of `read_runs`.

Functions of a list of records that return Markdown, as the blocks of a page want them
(`experiments.reporting.benchmark_blocks`). A run of one step is the start of those of its seed.
"""

from collections.abc import Sequence

import numpy as np

from experiments.pretrained.intervals import interval, points_above, points_below_float
from experiments.pretrained.record_words import (
    SETS,
    Record,
    grouped,
    markdown,
    method_of,
    width_of,
)

_LATENTS = {"corrected": "corrected weights", "codes": "values of the codes"}


def trials(records: Sequence[Record]) -> str:
    """A row for each method, its latents and rate, read on images to choose on, nearest first.

    `nats`: how far what the network says is from what the float network says; `points`: of
    accuracy, below it.
    """
    rows = []
    for way, of_way in grouped(records, _way).items():
        nats = float(np.mean([record["divergence_from_float"]["tiny"] for record in of_way]))
        points = float(np.mean([record["points_below_float"]["tiny"] for record in of_way]))
        rows.append((nats, [*way, f"{nats:.3f}", f"{points:.1f}"]))
    head = ["weights", "method", "latents", "rate", "nats", "points"]
    return markdown(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])], left=3)


def trained(records: Sequence[Record]) -> str:
    """A row for each width and method: points below float, and above the codes at the start.

    In brackets 95 % intervals, over images and seeds; those above the start are paired.
    """
    starts = {(width_of(r), r["config"]["seed"]): r for r in records if method_of(r) == "start"}
    head = ["weights", "method", "latents", "rate"]
    head += [f"points below float, {name}" for name in SETS.values()]
    head += [f"above the start, {name}" for name in SETS.values()]
    head += ["minutes", "n"]
    rows = []
    for (width, *way), of_row in grouped(records, _way).items():
        below = [interval(points_below_float(of_row, name)) for name in SETS]
        above = ["" for _ in SETS]
        if way[0] != "start":
            own = [starts[width, record["config"]["seed"]] for record in of_row]
            above = [interval(points_above(of_row, own, name), sign=True) for name in SETS]
        minutes = f"{np.mean([record['seconds'] for record in of_row]) / 60:.1f}"
        rows.append([width, *way, *below, *above, minutes, str(len(of_row))])
    return markdown(head, rows, left=3)


def _way(record: Record) -> tuple[str, str, str, str]:
    """Width, method, latents and rate, as a table says them."""
    method, config = method_of(record), record["config"]
    if method == "start":
        return width_of(record), method, "", ""
    latents = _LATENTS[config["latents"]]
    return width_of(record), method, latents, f"{config['learning_rate']:g}"
