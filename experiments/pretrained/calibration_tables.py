"""Tables of a study of calibration, from its records.

Functions of a list of records that return Markdown, as the blocks of a page want them
(`experiments.reporting.benchmark_blocks`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from experiments.pretrained.readings import from_bits
from experiments.reporting.paired_statistics import mean_and_deviation

Record = dict[str, Any]

_METHODS = {
    "rounded": "rounding alone",
    "rounding": "rounding",
    "weighted_scales": "weighted scales",
    "adaround": "AdaRound",
    "gptq": "GPTQ",
    "coordinate_descent": "coordinate descent",
}
_SOURCES = {"photographs": "photographs", "tiny": "Tiny ImageNet", "both": "half of each"}
_SETS = {"photographs": "photographs", "tiny": "Tiny ImageNet"}


def choices(records: Sequence[Record]) -> str:
    """A row for each way to calibrate, read on images to choose on; a pair of columns each width.

    `nats`: how far what the network says is from what the float network says; `points`: of
    accuracy, below it.
    """
    widths = list(dict.fromkeys(map(_width, records)))
    head = ["method", "regression", "matched", "images"]
    head += [f"{width}: {unit}" for width in widths for unit in ("nats", "points")]
    rows = []
    for way, of_way in _grouped(records, _way).items():
        by_width = _grouped(of_way, _width)
        cells = []
        for width in widths:
            one = by_width.get(width)
            cells += ["", ""] if one is None else [_nats(one), _points(one, "tiny")]
        rows.append([*way, *cells])
    return _markdown(head, rows, left=3)


def finals(records: Sequence[Record]) -> str:
    """A row for each width and way to calibrate: points below float, bytes, minutes and images.

    In brackets 95 % intervals, over images and draws.
    """
    sets = [name for name in _SETS if name in records[0]["points_below_float"]]
    head = ["weights", "method", "regression", "matched", "calibrated on"]
    head += [f"points below float, {_SETS[name]}" for name in sets]
    head += ["kB", "minutes", "n"]
    rows = []
    for (width, *way), of_row in _grouped(records, lambda r: (_width(r), *_way(r))).items():
        method, regression, matched, images = way
        source = "" if images == "0" else f"{images} {_SOURCES[of_row[0]['config']['source']]}"
        below = [_interval(of_row, name) for name in sets]
        kilobytes = f"{of_row[0]['bytes']['codes_and_scales'] / 1000:.0f}"
        minutes = f"{np.mean([r['seconds'] for r in of_row]) / 60:.1f}"
        rows.append([width, method, regression, matched, source, *below, kilobytes, minutes])
        rows[-1].append(str(len(of_row)))
    return _markdown(head, rows, left=5)


def points_below_float(records: Sequence[Record], name: str) -> tuple[float, float]:
    """The mean over draws of points below float on a set of images, and its 95 % half width.

    Images and draws both vary by chance, so their variances of the mean add up: of draws by
    Student's t, of images, which are hundreds, by the normal distribution. The interval is somewhat
    wide, since what images and draws make together counts in both. Of one draw: images alone.
    """
    count = records[0]["images"]["read"][name] if "read" in records[0]["images"] else None
    lost = np.array([_lost(record, name, count) for record in records])
    mean, deviation = mean_and_deviation([float(x) for x in lost.mean(1)])
    of_images = 1.96 * float(lost.mean(0).std(ddof=1)) / math.sqrt(lost.shape[1])
    if deviation is None:
        return mean, of_images
    n = len(records)
    of_draws = float(student_t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return mean, math.hypot(of_draws, of_images)


def _lost(record: Record, name: str, count: int | None) -> np.ndarray:
    """Of each image 100, 0 or -100: whether it is named right in float and by the codes."""
    right = record["right"][name]
    size = count or 4 * len(right["float"])
    in_float, quantized = (
        from_bits(right[network], size).astype(float) for network in ("float", "quantized")
    )
    lost: np.ndarray = 100 * (in_float - quantized)
    return lost


def _interval(records: Sequence[Record], name: str) -> str:
    mean, half = points_below_float(records, name)
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def _nats(records: Sequence[Record]) -> str:
    return f"{np.mean([record['divergence_from_float']['tiny'] for record in records]):.3f}"


def _points(records: Sequence[Record], name: str) -> str:
    return f"{np.mean([record['points_below_float'][name] for record in records]):.1f}"


def _width(record: Record) -> str:
    """`W4` or, with depthwise layers at other bits, `W4, depthwise 8`."""
    bits, depthwise = record["config"]["bits"], record["config"]["depthwise_bits"]
    return f"W{bits}" if depthwise in (None, bits) else f"W{bits}, depthwise {depthwise}"


def _way(record: Record) -> tuple[str, str, str, str]:
    """Method, regression, what is matched, and how many images, as a table says them."""
    config = record["config"]
    images = str(record["images"]["calibrated"])
    if config["method"] == "rounded":
        return _METHODS["rounded"], "", "", images
    regression = {None: "by layer", "inf": "none"}.get(config["regression"], config["regression"])
    matched = {"deviation": "mean, deviation"}.get(config["matching"], config["matching"])
    method = _METHODS.get(config["method"], config["method"])
    if config.get("reconstruct"):
        method += ", then blocks"
    return method, str(regression), matched, images


def _grouped(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A table; the columns behind the first `left` ones stand to the right."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
