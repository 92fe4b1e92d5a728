"""Curves over training: accuracy and alpha, and the codes that change."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.run_records import Record
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
        return _accuracy_of_each(series, theme)
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


def _accuracy_of_each(series: Sequence[Series], theme: Theme) -> Figure:
    """As trained and from the codes, a plot a line, and alpha of all below them."""
    figure, grid, below = _grid(series, below=True)
    assert below is not None
    codes = [curve(line.records, "recalibrated_accuracy") for line in series]
    _draw_each(grid, series, codes, theme)
    for axes, line, color in zip(grid, series, colors(series, theme), strict=True):
        trained = _as_trained(line)
        axes.plot(trained[:, 0], 100 * trained[:, 1], color=color, linestyle="--", linewidth=1.1)
    _draw_alphas(below, series, theme)
    told = "validation accuracy (%); solid: integer codes, dashed: as trained"
    figure.supylabel(told, fontsize=10)
    return figure


def _grid(series: Sequence[Series], *, below: bool) -> tuple[Figure, list[Axes], Axes | None]:
    """A figure with axes for each line that share both scales, and perhaps wide ones below."""
    rows = -(-len(series) // _ACROSS)
    figure = Figure(figsize=(WIDTH, 0.3 + 1.75 * (rows + below)), layout="constrained")
    places = figure.add_gridspec(rows + below, _ACROSS)
    grid: list[Axes] = []
    for i in range(len(series)):
        first = grid[0] if grid else None
        axes = figure.add_subplot(places[divmod(i, _ACROSS)], sharex=first, sharey=first)
        axes.tick_params(labelleft=i % _ACROSS == 0)
        grid.append(axes)
    return figure, grid, figure.add_subplot(places[rows, :]) if below else None


def _draw_each(
    grid: Sequence[Axes], series: Sequence[Series], curves: Sequence[np.ndarray], theme: Theme
) -> None:
    """Each line's curve in percent, with those of all others in the background."""
    inks = colors(series, theme)
    for axes, line, own, color in zip(grid, series, curves, inks, strict=True):
        for other in curves:
            axes.plot(other[:, 0], 100 * other[:, 1], color=theme.grid, linewidth=1)
        _band(axes, own, color, percent=True)
        axes.set_title(textwrap.fill(line.label, 22), fontsize=9)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))


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
    changed = [curve(line.records, "changed_codes") for line in series]
    if len(series) > MOST_TOGETHER:
        figure, (axes, *others), _ = _grid(series, below=False)
        _draw_each([axes, *others], series, changed, theme)
        figure.supylabel("codes changed (%)", fontsize=10)
        figure.supxlabel("step", fontsize=10)
    else:
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        for points, color in zip(changed, colors(series, theme), strict=True):
            _band(axes, points, color, percent=True)
        axes.set(xlabel="step", ylabel="codes changed (%)")
        legend(figure, series, theme)
    # Logarithmic, but 0 must be on it: past alpha = 1 no code changes at all.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    return figure


def _band(axes: Axes, points: np.ndarray, color: str, percent: bool = False) -> None:
    steps, (mean, least, most) = points[:, 0], (100 if percent else 1) * points[:, 1:].T
    # Few evaluations are shown for what they are: points, joined.
    axes.plot(steps, mean, color=color, marker="o" if len(steps) <= 10 else "", markersize=3.5)
    axes.fill_between(steps, least, most, color=color, alpha=0.18, linewidth=0)
