"""Accuracy of a study's networks against the bytes that they take."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.paired_statistics import mean_and_deviation
from experiments.reporting.run_records import method_label
from experiments.reporting.table_parts import AS_TRAINED, FROM_CODES, by_seed
from experiments.reporting.themes import WIDTH, Series, Theme, colors, legend

_ASIDE = 0.6  # of the room of a size, what its points take beside each other


@dataclass(frozen=True)
class Point:
    """A network: its method, bytes, mean accuracy and deviation in percent, None for one seed."""

    method: str
    size: int
    accuracy: float
    deviation: float | None
    as_trained: bool
    color: str


def points_of(series: Sequence[Series], theme: Theme) -> list[Point]:
    """The points of all series whose size is known and that read the test set.

    Float that was rounded to several levels is one point as it was trained.
    """
    methods = _methods(series)
    inks = dict(zip((line.method for line in methods), colors(methods, theme), strict=True))
    found: list[Point] = []
    for line in series:
        if line.size is None:
            continue
        as_trained, packed = line.size
        readings = [(packed, FROM_CODES)]
        if line.method == "float":
            readings.append((as_trained, AS_TRAINED))
        for size, keys in readings:
            if values := list(by_seed(line.records, "test", keys[1]).values()):
                mean, deviation = mean_and_deviation(values)
                trained = keys == AS_TRAINED
                point = Point(line.method, size, mean, deviation, trained, inks[line.method])
                if not (trained and point in found):
                    found.append(point)
    return found


def draw_sizes(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Test accuracy over bytes, a point a network; those of a method are joined.

    Of several sizes, those trained for their levels stand once more below, without float's range.
    """
    points = points_of(series, theme)
    if not points:
        return None
    shown = [points]
    trained = [point for point in points if point.method != "float"]
    if len({point.size for point in trained}) > 1 and len(trained) < len(points):
        shown.append(trained)
    figure = Figure(figsize=(WIDTH, 0.6 + 3 * len(shown)), layout="constrained")
    for axes, drawn in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        _draw_points(axes, drawn, theme)
        axes.set_ylabel("test accuracy (%)")
    axes.set_xlabel("bytes of the parameters, by size")
    if len(shown) > 1:
        axes.set_title("without float")
    legend(figure, _methods(series), theme)
    return figure


def _draw_points(axes: Axes, points: Sequence[Point], theme: Theme) -> None:
    """Each size has a room of its own on the axis, in which its points stand beside each other."""
    sizes = sorted({point.size for point in points})
    joined: dict[tuple[str, bool], list[tuple[float, Point]]] = {}
    for room, size in enumerate(sizes):
        members = [point for point in points if point.size == size]
        for place, point in enumerate(members):
            x = room + _ASIDE * ((place + 0.5) / len(members) - 0.5)
            rounded = point.method == "float" and not point.as_trained
            axes.errorbar(
                x,
                point.accuracy,
                yerr=point.deviation,
                color=point.color,
                marker="o",
                markersize=5,
                markerfacecolor=theme.background if rounded else point.color,
                linewidth=1,
            )
            joined.setdefault((point.method, point.as_trained), []).append((x, point))
    for placed in joined.values():
        # Of equal sizes, as different ramps have, a line would show no order.
        if len({point.size for _, point in placed}) == len(placed):
            xs, ys = [x for x, _ in placed], [point.accuracy for _, point in placed]
            axes.plot(xs, ys, color=placed[0][1].color, linewidth=0.8, zorder=1)
    axes.set_xticks(range(len(sizes)), [bytes_text(size) for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.grid(axis="x", visible=False)


def _methods(series: Sequence[Series]) -> list[Series]:
    """A series for each method, named by it alone: here a method has one colour."""
    first = {line.method: line for line in reversed(series)}
    return [
        Series(method_label(method), method, first[method].records)
        for method in dict.fromkeys(line.method for line in series)
    ]


def bytes_text(value: float) -> str:
    """`300 B`, `20 kB`, `1.5 MB`, of 1000 each."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:g} B"
