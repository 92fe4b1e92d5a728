"""A study's plots: accuracy and alpha over training, codes that change, weights reaching levels.

Each function returns a matplotlib Figure, drawn without pyplot and so without global state;
`render` turns it into a PNG. A method has the same colour in every plot.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.reporting.run_records import Record
from experiments.reporting.size_plot import draw_sizes
from experiments.reporting.themes import DARK, LIGHT, WIDTH, Series, Theme, colors
from experiments.reporting.training_curves import draw_accuracy, draw_changed_codes

DPI = 160
COLUMNS = 4  # of histograms beside each other
CURVES = ("accuracy", "changed_codes", "weights")
SIZES = ("size",)
MAX_FRAMES = 7  # histograms drawn of one run, evenly chosen over training


@dataclass(frozen=True)
class Plot:
    """A rendered plot: file stem, heading, what is to be seen, and the PNG for either theme."""

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes


def render_plots(
    series: Sequence[Series],
    suffix: str = "",
    heading: str = "",
    kinds: Sequence[str] = (*CURVES, *SIZES),
) -> list[Plot]:
    """Every plot of these kinds that the runs hold data for, in both themes.

    `suffix` and `heading` are added to the plots' names and titles.
    """
    drawings = [
        (
            "accuracy",
            "Accuracy and alpha over training",
            "Mean over the seeds; the band spans all of them. The codes are read with re-estimated "
            "batch-norm statistics (dotted, where shown: with those that ran along in training). "
            "The network as trained begins as the float network that the runs start from.",
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
        (
            "size",
            "Accuracy against bytes",
            "Test accuracy, re-estimated batch-norm statistics: mean and sample standard deviation "
            "over the seeds. Bytes are those of the parameters, codes at their true width and "
            "their scales included; filled circles of float are the network as trained, hollow "
            "ones the same rounded.",
            draw_sizes,
        ),
    ]
    plots = []
    for name, title, caption, draw in drawings:
        if name not in kinds:
            continue
        images = [_render(draw, series, theme) for theme in (LIGHT, DARK)]
        if images[0] is not None and images[1] is not None:
            plots.append(
                Plot(f"{name}{suffix}", f"{title}{heading}", caption, images[0], images[1])
            )
    return plots


def _render(draw: Any, series: Sequence[Series], theme: Theme) -> bytes | None:
    with mpl.rc_context(theme.rc()):
        figure = draw(series, theme)
        if figure is None:
            return None
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue()


def draw_weights(series: Sequence[Series], theme: Theme) -> Figure | None:
    """A column a method: one layer's effective weights, from the start to the end of training."""
    shown = []
    for line, color in zip(series, colors(series, theme), strict=True):
        held = next((r for r in line.records if _frames(r)), None)
        if held is not None:
            shown.append((line.label, color, held))
    if not shown:
        return None
    across = min(len(shown), COLUMNS)
    down = -(-len(shown) // across)
    figure = Figure(figsize=(WIDTH, 4.6 * down), layout="constrained")
    labelled: list[str] = []
    columns = figure.subplots(down, across, squeeze=False).flatten()
    for axes in columns[len(shown) :]:
        axes.set_axis_off()
    for place, (label, color, record) in enumerate(shown):
        axes = columns[place]
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
        axes.set(title=textwrap.fill(label, 18), xlabel="weight / scale")
        axes.set(xlim=(edges[0], right), ylim=(-len(rows) + 1, 1))
        steps = [str(frames[index]["step"]) for index in rows]
        # Once in a line, where all of its columns show the same steps.
        if steps != labelled or place % across == 0:
            axes.set_yticks([-row for row in range(len(rows))], steps)
            labelled = steps
        else:
            axes.set_yticks([])
        axes.tick_params(axis="y", length=0)
        axes.grid(False)
        axes.spines["left"].set_visible(False)
    for axes in columns[::across]:
        axes.set_ylabel("step")
    return figure


def _frames(record: Record) -> Sequence[Mapping[str, Any]]:
    return (record.summary.get("histograms") or {}).get("frames") or []
