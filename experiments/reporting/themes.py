"""How a study's plots look: colours of methods on light and dark, legends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.reporting.run_records import Record, name_of
from experiments.settings.methods import METHODS

WIDTH = 5.6  # inches; narrow, so that text stays legible on a phone


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


LIGHT = Theme(
    background="#ffffff",
    text="#222222",
    grid="#d9d9d9",
    methods={name: m.colors[0] for name, m in METHODS.items() if m.colors},
    others=("#e0408a", "#2f7d7d", "#a3a3d1"),
)
DARK = Theme(
    background="#16191d",
    text="#e4e6e8",
    grid="#3a3f45",
    methods={name: m.colors[1] for name, m in METHODS.items() if m.colors},
    others=("#ff7ab8", "#6fbdbd", "#c9c9ee"),
)


@dataclass(frozen=True)
class Series:
    """The runs behind one line: the same flags, different seeds.

    `size` has the bytes of their network's parameters as trained and packed, where they are known.
    """

    label: str
    method: str
    records: Sequence[Record]
    size: tuple[int, int] | None = None


def colors(series: Sequence[Series], theme: Theme) -> list[str]:
    """One colour a line: a method's own, and other shades of it for its further lines."""
    names = [name_of(line.method) for line in series]
    unknown = sorted({*names} - theme.methods.keys())
    base = {m: theme.others[i % len(theme.others)] for i, m in enumerate(unknown)}
    base.update(theme.methods)
    # Towards the paper and the ink in turn, so that neighbours differ most.
    shades = [(1.0, theme.text), (0.5, theme.background), (0.5, theme.text)]
    shades += [(0.28, theme.background), (0.75, theme.text), (0.75, theme.background)]
    drawn: dict[str, int] = {}
    chosen = []
    for name in names:
        count = drawn[name] = drawn.get(name, -1) + 1
        strength, other = shades[count % len(shades)]
        ends = zip(mpl.colors.to_rgb(base[name]), mpl.colors.to_rgb(other), strict=True)
        red, green, blue = (strength * own + (1 - strength) * end for own, end in ends)
        chosen.append(mpl.colors.to_hex((red, green, blue)))
    return chosen


def legend(figure: Figure, series: Sequence[Series], theme: Theme) -> None:
    """A line for each series above the plot, in as many columns as their names leave room for."""
    lines = [Line2D([], [], color=color) for color in colors(series, theme)]
    labels = [line.label for line in series]
    widest = max(map(len, labels))
    columns = 4 if widest <= 12 else 3 if widest <= 17 else 2 if widest <= 32 else 1
    # A long legend gets room of its own, and takes none from the plot.
    further = -(-len(labels) // columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.19 * further)
    figure.legend(lines, labels, loc="outside upper center", ncols=min(len(labels), columns))
