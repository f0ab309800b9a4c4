"""The look of every plot of the measures: colours, titles and axes in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samopt.sharpness._measuring.optional_packages import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "DPI", "GREY", "ORANGE", "colors", "finish", "new_figure", "new_panels"]

# Okabe & Ito's colours, which also readers with colour-blindness can tell apart.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, ORANGE = _PALETTE[:2]
GREY = "#999999"
DPI = 130
_PANEL = 5.4, 3.6  # inches
_COLUMNS = 2
_INSIDE = 4  # entries of a legend; a longer one stands beside its panel, where it covers no line


def colors(count: int) -> list[str]:
    """Return as many colours as there are lines, no two equal.

    Args:
        count: Number of lines.
    """
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    colormap = require("matplotlib", "a plot").colormaps["turbo"]
    to_hex = require("matplotlib.colors", "a plot").to_hex
    return [to_hex(colormap(0.05 + 0.9 * index / (count - 1))) for index in range(count)]


def new_figure(width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes; pyplot's state is left alone.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure: Figure = require("matplotlib.figure", "a plot").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def new_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels, two in a row.

    Args:
        count: Number of panels, >= 1.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure: Figure = require("matplotlib.figure", "a plot").Figure(
        figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained"
    )
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def finish(axes: Axes, title: str) -> None:
    """Give a panel its title, a light grid and, where lines have names, a legend.

    Args:
        axes: The panel.
        title: What to write above it.
    """
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        beside = len(handles) > _INSIDE
        axes.legend(
            handles,
            names,
            frameon=False,
            fontsize="x-small" if beside else "small",
            loc="center left" if beside else "best",
            bbox_to_anchor=(1.0, 0.5) if beside else None,
        )
