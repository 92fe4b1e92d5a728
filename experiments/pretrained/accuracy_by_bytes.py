"""A picture of accuracy against bytes, of all methods that calibrate or train, from their records.

    python -m experiments.pretrained.accuracy_by_bytes results/pretrained/mobilenet/final \\
        results/pretrained_training_read/final --out=results/pretrained/mobilenet/bytes.png

A column for each set of images, a point for each method and width, with the 95 % interval of what
it loses from the float network. Below, once more without what rounding alone leaves.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ab_jax.files import write_whole, writing
from experiments.pretrained.intervals import points_below_float
from experiments.pretrained.record_words import (
    CALIBRATIONS,
    SETS,
    Record,
    grouped,
    method_of,
    width_of,
)
from experiments.reporting.size_plot import bytes_text
from experiments.reporting.themes import LIGHT
from experiments.settings.command_line import end_with_a_line
from experiments.settings.config import FlagError
from experiments.settings.methods import METHODS

_WIDTH, _HEIGHT = 8.0, 5.4  # inches
_DPI = 160
_BESIDE = 0.7  # of the room of a width, what its methods take beside each other
_FLOAT, _ALONE = "float", CALIBRATIONS["rounded"]
_COLORS = {
    _FLOAT: "#555555",
    _ALONE: "#999999",
    CALIBRATIONS["rounding"]: "#b58900",
    CALIBRATIONS["gptq"]: "#7fa800",
    CALIBRATIONS["adaround"]: "#e0408a",
    CALIBRATIONS["coordinate_descent"]: "#2f7d7d",
    **{method.label: method.colors[0] for method in METHODS.values() if method.colors},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which records, and where to."""

    records: tyro.conf.Positional[tuple[Path, ...]]  # directories, of calibrated or trained ones
    out: Path  # the PNG to write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A method at a width: its room on the axis, and its accuracy in percent with half a width."""

    method: str
    width: str
    size: int  # bytes of the weights
    accuracy: float
    half: float


def points_of(records: Sequence[Record], name: str) -> list[Point]:
    """Of a set of images, smallest first; the float network is the last.

    Of a method that was run in several ways it is the best one.
    """
    found: dict[tuple[str, str], Point] = {}
    for ways in grouped(records, _way).values():
        first = ways[0]
        lost, half = points_below_float(ways, name)
        point = Point(
            method=method_of(first),
            width=width_of(first),
            size=first["bytes"]["codes_and_scales"],
            accuracy=first["float"][name] - lost,
            half=half,
        )
        key = (point.width, point.method)
        if key not in found or found[key].accuracy < point.accuracy:
            found[key] = point
    in_float = records[0]["bytes"]["in_float32"], records[0]["float"][name]
    whole = Point(method=_FLOAT, width=_FLOAT, size=in_float[0], accuracy=in_float[1], half=0.0)
    order = list(_COLORS)
    return sorted([*found.values(), whole], key=lambda p: (p.size, order.index(p.method)))


def _way(record: Record) -> tuple[str, str]:
    """Its width, and all flags but what is drawn by chance."""
    chance = ("draw", "seed", "name", "init_from", "record", "out")
    flags = {key: value for key, value in record["config"].items() if key not in chance}
    return width_of(record), json.dumps(flags, sort_keys=True, default=str)


def draw(records: Sequence[Record]) -> Figure:
    """The figure of all records but those of the starts of training.

    Raises:
      FlagError: there is none.
    """
    shown = [record for record in records if method_of(record) != "start"]
    if not shown:
        raise FlagError("There are no records to draw.")
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    columns = figure.subplots(2, len(SETS), squeeze=False, sharex="col").T
    for axes, (name, label) in zip(columns, SETS.items(), strict=True):
        points = points_of(shown, name)
        rooms = list(dict.fromkeys(point.width for point in points))
        for one, drawn in zip(
            axes, (points, [p for p in points if p.method != _ALONE]), strict=True
        ):
            _draw_points(one, drawn, rooms)
            one.set_ylabel("accuracy (%)")
        axes[0].set_title(label)
        axes[1].set_title("without rounding alone")
        sizes = {point.width: bytes_text(point.size) for point in points}
        labels = [f"{room.replace(', depthwise', chr(10) + 'dw')}\n{sizes[room]}" for room in rooms]
        axes[1].set_xticks(range(len(rooms)), labels)
    methods = [m for m in _COLORS if m in {_FLOAT, *map(method_of, shown)}]
    marks = [Line2D([], [], color=_COLORS[method], marker="o", linestyle="") for method in methods]
    figure.legend(marks, methods, loc="outside upper center", ncols=4)
    return figure


def _draw_points(axes: Axes, points: Sequence[Point], rooms: Sequence[str]) -> None:
    for room, width in enumerate(rooms):
        members = [point for point in points if point.width == width]
        for place, point in enumerate(members):
            axes.errorbar(
                room + _BESIDE * ((place + 0.5) / len(members) - 0.5),
                point.accuracy,
                yerr=point.half,
                color=_COLORS[point.method],
                marker="o",
                markersize=5,
                linewidth=1.2,
            )
            if point.method == _FLOAT:
                axes.axhline(point.accuracy, color=_COLORS[_FLOAT], linewidth=0.8, zorder=1)
    axes.set_xlim(-0.5, len(rooms) - 0.5)
    axes.grid(axis="x", visible=False)


def run(config: Config) -> None:
    """Draw the records and write the picture.

    Raises:
      FlagError: no records. ValueError, OSError: one that cannot be read, or a picture that cannot
        be written.
    """
    paths = [path for directory in config.records for path in sorted(directory.rglob("*.json"))]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    with mpl.rc_context(LIGHT.rc()):
        file = io.BytesIO()
        draw(records).savefig(file, format="png", dpi=_DPI)
    with writing(config.out):
        config.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config.out, file.getvalue())


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(
        Config,
        prog="python -m experiments.pretrained.accuracy_by_bytes",
        description=__doc__,
        use_underscores=True,
    )
    end_with_a_line(lambda: run(config))


if __name__ == "__main__":
    main()
