"""Tables of a study of calibration, from its records.

Functions of a list of records that return Markdown, as the blocks of a page want them
(`experiments.reporting.benchmark_blocks`).
"""

from collections.abc import Sequence

import numpy as np

from experiments.pretrained.intervals import interval, points_below_float
from experiments.pretrained.record_words import (
    SETS,
    SOURCES,
    Record,
    grouped,
    markdown,
    method_of,
    width_of,
)


def choices(records: Sequence[Record]) -> str:
    """A row for each way to calibrate, read on images to choose on; a pair of columns each width.

    `nats`: how far what the network says is from what the float network says; `points`: of
    accuracy, below it.
    """
    widths = list(dict.fromkeys(map(width_of, records)))
    head = ["method", "regression", "matched", "images"]
    head += [f"{width}: {unit}" for width in widths for unit in ("nats", "points")]
    rows = []
    for way, of_way in grouped(records, _way).items():
        by_width = grouped(of_way, width_of)
        cells = []
        for width in widths:
            one = by_width.get(width)
            cells += ["", ""] if one is None else [_nats(one), _points(one, "tiny")]
        rows.append([*way, *cells])
    return markdown(head, rows, left=3)


def finals(records: Sequence[Record]) -> str:
    """A row for each width and way to calibrate: points below float, nats, bytes, minutes, draws.

    In brackets 95 % intervals, over images and draws. `nats`, of each set: how far what the network
    says is from what the float network says. `minutes`: of the fastest draw.
    """
    sets = [name for name in SETS if name in records[0]["points_below_float"]]
    head = ["weights", "method", "regression", "matched", "calibrated on"]
    head += [f"points below float, {SETS[name]}" for name in sets]
    head += ["nats", "kB", "minutes", "n"]
    rows = []
    for width, of_width in grouped(records, width_of).items():
        for (*way, source), draws in grouped(of_width, _way_and_source).items():
            below = [interval(points_below_float(draws, name)) for name in sets]
            nats = " / ".join(f"{_mean_nats(draws, name):.3f}" for name in sets)
            kilobytes = f"{draws[0]['bytes']['codes_and_scales'] / 1000:.0f}"
            minutes = f"{min(record['seconds'] for record in draws) / 60:.1f}"
            rows.append([width, *way[:3], source, *below, nats, kilobytes, minutes])
            rows[-1].append(str(len(draws)))
    return markdown(head, rows, left=5)


def _way_and_source(record: Record) -> tuple[str, ...]:
    way = _way(record)
    source = "" if way[-1] == "0" else f"{way[-1]} {SOURCES[record['config']['source']]}"
    return *way, source


def _mean_nats(records: Sequence[Record], name: str) -> float:
    return float(np.mean([record["divergence_from_float"][name] for record in records]))


def _nats(records: Sequence[Record]) -> str:
    return f"{_mean_nats(records, 'tiny'):.3f}"


def _points(records: Sequence[Record], name: str) -> str:
    return f"{np.mean([record['points_below_float'][name] for record in records]):.1f}"


def _way(record: Record) -> tuple[str, str, str, str]:
    """Method, regression, what is matched, and how many images, as a table says them."""
    config = record["config"]
    images = str(record["images"]["calibrated"])
    if config["method"] == "rounded":
        return method_of(record), "", "", images
    regression = {None: "by layer", "inf": "none"}.get(config["regression"], config["regression"])
    matched = {"deviation": "mean, deviation"}.get(config["matching"], config["matching"])
    return method_of(record), str(regression), matched, images
