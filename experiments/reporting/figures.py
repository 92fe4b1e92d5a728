"""A study's plots: accuracy and alpha over training, codes that change, weights reaching levels.

Each function returns a matplotlib Figure, drawn without pyplot and so without global state;
`render` turns it into a PNG. A method has the same colour in every plot.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.reporting.readings import METHODS, Record

DPI = 160
WIDTH = 5.6  # inches; narrow, so that text stays legible on a phone
MAX_FRAMES = 7  # histograms drawn of one run, evenly chosen over training


@dataclass(frozen=True)
class Theme:
    """The colours of a plot; methods without a colour of their own take `others` in turn."""

    background: str
    text: str
    grid: str
    methods: Mapping[str, str]
    others: tuple[str, ...]

    def rc(self) -> Any:
        """The matplotlib settings to draw under."""
        return {
            "figure.facecolor": self.background,
            "axes.facecolor": self.background,
            "savefig.facecolor": self.background,
            "text.color": self.text,
            "axes.labelcolor": self.text,
            "axes.edgecolor": self.grid,
            "xtick.color": self.text,
            "ytick.color": self.text,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "font.size": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.5,
        }


# Distinct to readers with colour blindness too (the palette of Okabe and Ito, lighter on dark).
LIGHT = Theme(
    background="#ffffff",
    text="#222222",
    grid="#d9d9d9",
    methods={"float": "#555555", "ste": "#d55e00", "soft_ste": "#009e73", "ab": "#0072b2"},
    others=("#cc79a7", "#b58900", "#56b4e9", "#7f4fc9"),
)
DARK = Theme(
    background="#16191d",
    text="#e4e6e8",
    grid="#3a3f45",
    methods={"float": "#b4b8bc", "ste": "#ff8a4c", "soft_ste": "#3dcb9f", "ab": "#5bb8f5"},
    others=("#f0a3cb", "#e6c34d", "#8fd3ff", "#b79bf0"),
)


@dataclass(frozen=True)
class Series:
    """The runs behind one line: the same flags, different seeds."""

    label: str
    method: str
    records: Sequence[Record]


@dataclass(frozen=True)
class Plot:
    """A rendered plot: file stem, heading, what is to be seen, and the PNG for either theme."""

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes


def render_plots(series: Sequence[Series]) -> list[Plot]:
    """Every plot these runs hold data for, in both themes."""
    drawings = [
        (
            "accuracy",
            "Accuracy and alpha over training",
            "Mean over the seeds; the band spans all of them. The codes are read with re-estimated "
            "batch-norm statistics, dotted with those that ran along in training.",
            draw_accuracy,
        ),
        (
            "changed_codes",
            "Codes that change",
            "Share of the integer codes that differ from those of the evaluation before; "
            "the scale is linear below 0.01 %.",
            draw_changed_codes,
        ),
        (
            "weights",
            "Weights over the ramp",
            "Effective weights of one layer in one run, in units of their channels' scales; "
            "training goes from top to bottom, each histogram is drawn to its own peak.",
            draw_weights,
        ),
    ]
    plots = []
    for name, title, caption, draw in drawings:
        images = [_render(draw, series, theme) for theme in (LIGHT, DARK)]
        if images[0] is not None and images[1] is not None:
            plots.append(Plot(name, title, caption, images[0], images[1]))
    return plots


def _render(draw: Any, series: Sequence[Series], theme: Theme) -> bytes | None:
    with mpl.rc_context(theme.rc()):
        figure = draw(series, theme)
        if figure is None:
            return None
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue()


def colors(series: Sequence[Series], theme: Theme) -> list[str]:
    """One colour a line: a method's own, paler for its second and later lines."""
    unknown = sorted({line.method for line in series} - theme.methods.keys())
    base = {m: theme.others[i % len(theme.others)] for i, m in enumerate(unknown)}
    base.update(theme.methods)
    drawn: dict[str, int] = {}
    chosen = []
    for line in series:
        count = drawn[line.method] = drawn.get(line.method, -1) + 1
        strength = 1 / (1 + 0.6 * count)
        ink = mpl.colors.to_rgb(base[line.method])
        paper = mpl.colors.to_rgb(theme.background)
        red, green, blue = (
            strength * i + (1 - strength) * p for i, p in zip(ink, paper, strict=True)
        )
        chosen.append(mpl.colors.to_hex((red, green, blue)))
    return chosen


def curve(records: Sequence[Record], key: str) -> np.ndarray:
    """Mean, least and greatest value of a metric over the runs at each step.

    Returns rows (step, mean, min, max), float64, shape (evaluations, 4); steps that no run has a
    value for are left out.
    """
    values: dict[int, list[float]] = {}
    for record in records:
        for line in record.metrics:
            if line.get(key) is not None:
                values.setdefault(int(line["step"]), []).append(float(line[key]))
    rows = [(step, np.mean(v), min(v), max(v)) for step, v in sorted(values.items())]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def draw_accuracy(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Validation accuracy of the blended network and of its codes, and alpha below them."""
    keys = ("blended_accuracy", "quantized_accuracy", "recalibrated_accuracy")
    if not any(len(curve(line.records, key)) for line in series for key in keys):
        return None
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.3))
    for i, (line, color) in enumerate(zip(series, colors(series, theme), strict=True)):
        _band(top, curve(line.records, "blended_accuracy"), color, percent=True)
        _band(middle, curve(line.records, "recalibrated_accuracy"), color, percent=True)
        running = curve(line.records, "quantized_accuracy")
        middle.plot(running[:, 0], 100 * running[:, 1], color=color, linestyle=":", linewidth=1.3)
        alpha = curve(line.records, "alpha")
        # Methods share a ramp: a line is wider for each one that will be drawn upon it.
        width = 1.5 + 2.2 * sum(
            np.array_equal(alpha, curve(later.records, "alpha")) for later in series[i + 1 :]
        )
        bottom.plot(alpha[:, 0], alpha[:, 1], color=color, linewidth=width)
    top.set(title="network as trained (blended weights)", ylabel="validation accuracy (%)")
    middle.set(title="integer codes (dotted: running statistics)", ylabel="validation accuracy (%)")
    bottom.set(title="alpha", xlabel="step", ylim=(-0.05, 1.05), yticks=(0, 0.5, 1))
    _legend(figure, series, theme)
    return figure


def draw_changed_codes(series: Sequence[Series], theme: Theme) -> Figure | None:
    """The share of codes that changed since the evaluation before, in percent."""
    if not any(len(curve(line.records, "changed_codes")) for line in series):
        return None
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for line, color in zip(series, colors(series, theme), strict=True):
        _band(axes, curve(line.records, "changed_codes"), color, percent=True)
    # Logarithmic, but 0 must be on it: past alpha = 1 no code changes at all.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set(xlabel="step", ylabel="codes changed (%)")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    _legend(figure, series, theme)
    return figure


def draw_weights(series: Sequence[Series], theme: Theme) -> Figure | None:
    """A column a method: one layer's effective weights, from the start to the end of training."""
    shown = []
    for line, color in zip(series, colors(series, theme), strict=True):
        held = next((r for r in line.records if _frames(r)), None)
        if held is not None:
            shown.append((line.label, color, held))
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    labelled: list[str] = []
    columns = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (label, color, record) in zip(columns, shown, strict=True):
        edges = np.asarray(record.summary["histograms"]["edges"], dtype=np.float64)
        frames = _frames(record)
        rows = np.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES)).round().astype(int)
        for row, frame in enumerate(frames[index] for index in rows):
            counts = np.asarray(frame["counts"], dtype=np.float64)
            heights = 0.82 * counts / max(counts.max(), 1) - row
            axes.stairs(heights, edges, baseline=-row, fill=True, color=color)
            axes.axhline(-row, color=theme.grid, linewidth=0.8, zorder=0)
            axes.text(
                0.99,
                0.08 - row,
                f"α {frame['alpha']:.2f}",
                transform=axes.get_yaxis_transform(),
                ha="right",
                fontsize=8,
            )
        # Room on the right for the values of alpha.
        right = edges[-1] + 0.45 * (edges[-1] - edges[0])
        ticks = mpl.ticker.MaxNLocator(4).tick_values(edges[0], edges[-1])
        axes.set_xticks([tick for tick in ticks if edges[0] <= tick <= edges[-1]])
        axes.set(title=label, xlabel="weight / scale")
        axes.set(xlim=(edges[0], right), ylim=(-len(rows) + 1, 1))
        steps = [str(frames[index]["step"]) for index in rows]
        if steps != labelled:  # once, where all columns show the same steps
            axes.set_yticks([-row for row in range(len(rows))], steps)
            labelled = steps
        else:
            axes.set_yticks([])
        axes.tick_params(axis="y", length=0)
        axes.grid(False)
        axes.spines["left"].set_visible(False)
    columns[0].set_ylabel("step")
    return figure


def _frames(record: Record) -> Sequence[Mapping[str, Any]]:
    return (record.summary.get("histograms") or {}).get("frames") or []


def _band(axes: Axes, points: np.ndarray, color: str, percent: bool = False) -> None:
    steps, (mean, least, most) = points[:, 0], (100 if percent else 1) * points[:, 1:].T
    # Few evaluations are shown for what they are: points, joined.
    axes.plot(steps, mean, color=color, marker="o" if len(steps) <= 10 else "", markersize=3.5)
    axes.fill_between(steps, least, most, color=color, alpha=0.18, linewidth=0)


def _legend(figure: Figure, series: Sequence[Series], theme: Theme) -> None:
    lines = [Line2D([], [], color=color) for color in colors(series, theme)]
    labels = [line.label for line in series]
    figure.legend(lines, labels, loc="outside upper center", ncols=min(len(labels), 4))


def label_of(method: str, others: Mapping[str, Any]) -> str:
    """`AB`, or `AB, bits 4` where the lines differ by more than their method."""
    parts = [f"{flag.replace('_', ' ')} {value}" for flag, value in others.items()]
    return ", ".join([METHODS.get(method, method), *parts])
