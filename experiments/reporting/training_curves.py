"""Curves over training: accuracy and alpha, and the codes that change."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.readings import Record
from experiments.reporting.themes import WIDTH, Series, Theme, colors, legend

MOST_TOGETHER = 6  # lines in one plot; of more, each gets a plot of its own
_ACROSS = 3  # of those beside each other
_KEYS = ("blended_accuracy", "quantized_accuracy", "recalibrated_accuracy")


def curve(records: Sequence[Record], key: str, start: str | None = None) -> np.ndarray:
    """Mean, least and greatest value of a metric over the runs at each step.

    Args:
      records: of one line.
      key: of the metric.
      start: the accuracy of the networks that the runs start from, which then stands at step 0.

    Returns:
      Rows (step, mean, min, max), float64, shape (evaluations, 4); steps that no run has a value
      for are left out.
    """
    values: dict[int, list[float]] = {}
    for record in records:
        if start is not None and record.start is not None:
            values.setdefault(0, []).append(float(record.start[start]))
        for line in record.metrics:
            if line.get(key) is not None:
                values.setdefault(int(line["step"]), []).append(float(line[key]))
    rows = [(step, np.mean(v), min(v), max(v)) for step, v in sorted(values.items())]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def draw_accuracy(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Validation accuracy of the blended network and of its codes, and alpha below them."""
    if not any(len(curve(line.records, key)) for line in series for key in _KEYS):
        return None
    if len(series) > MOST_TOGETHER:
        return _small_multiples(series, theme)
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.3))
    for line, color in zip(series, colors(series, theme), strict=True):
        _band(top, _as_trained(line), color, percent=True)
        _band(middle, curve(line.records, "recalibrated_accuracy"), color, percent=True)
        running = curve(line.records, "quantized_accuracy")
        middle.plot(running[:, 0], 100 * running[:, 1], color=color, linestyle=":", linewidth=1.3)
    _draw_alphas(bottom, series, theme)
    top.set(title="network as trained (blended weights)", ylabel="validation accuracy (%)")
    middle.set(title="integer codes (dotted: running statistics)", ylabel="validation accuracy (%)")
    legend(figure, series, theme)
    return figure


def _small_multiples(series: Sequence[Series], theme: Theme) -> Figure:
    """A plot a line, with the codes of all others in the background."""
    rows = -(-len(series) // _ACROSS)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, _ACROSS, sharex=True, sharey=True, squeeze=False).flatten()
    codes = [curve(line.records, "recalibrated_accuracy") for line in series]
    for axes in grid[len(series) :]:
        axes.set_axis_off()
    for i, (line, color) in enumerate(zip(series, colors(series, theme), strict=True)):
        axes = grid[i]
        for other in codes:
            axes.plot(other[:, 0], 100 * other[:, 1], color=theme.grid, linewidth=1)
        trained = _as_trained(line)
        axes.plot(trained[:, 0], 100 * trained[:, 1], color=color, linestyle="--", linewidth=1.1)
        _band(axes, codes[i], color, percent=True)
        axes.set_title(textwrap.fill(line.label, 22), fontsize=9)
    for axes in grid[: len(series)]:
        # Where nothing stands below.
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    figure.supylabel("validation accuracy (%)", fontsize=10)
    figure.supxlabel("step; solid: integer codes, dashed: as trained", fontsize=10)
    return figure


def _as_trained(line: Series) -> np.ndarray:
    """The blended network's accuracy from the float start on."""
    found = curve(line.records, "blended_accuracy")
    return curve(line.records, "blended_accuracy", start="blended") if len(found) else found


def _draw_alphas(axes: Axes, series: Sequence[Series], theme: Theme) -> None:
    for i, (line, color) in enumerate(zip(series, colors(series, theme), strict=True)):
        alpha = curve(line.records, "alpha")
        # Methods share a ramp: a line is wider for each one that will be drawn upon it.
        width = 1.5 + min(2.2, 9 / len(series)) * sum(
            np.array_equal(alpha, curve(later.records, "alpha")) for later in series[i + 1 :]
        )
        axes.plot(alpha[:, 0], alpha[:, 1], color=color, linewidth=width)
    axes.set(title="alpha", xlabel="step", ylim=(-0.05, 1.05), yticks=(0, 0.5, 1))


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
    legend(figure, series, theme)
    return figure


def _band(axes: Axes, points: np.ndarray, color: str, percent: bool = False) -> None:
    steps, (mean, least, most) = points[:, 0], (100 if percent else 1) * points[:, 1:].T
    # Few evaluations are shown for what they are: points, joined.
    axes.plot(steps, mean, color=color, marker="o" if len(steps) <= 10 else "", markersize=3.5)
    axes.fill_between(steps, least, most, color=color, alpha=0.18, linewidth=0)
