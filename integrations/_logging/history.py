"""A picture of what a run logged about sharpness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from samopt.sharpness._measuring.optional_packages import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_history"]

_COLUMNS = 2
_PANEL = 5.0, 3.4  # inches
_TITLES = {"sam": "rise in the optimizer's own ascent"}


def draw_history(history: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> Figure:
    """Return a figure with a panel for each measure over the steps: a line, or one for each of its layers.

    Args:
        history: What was logged at each step, by step.
        names: What to draw; ``sharpness/NAME`` is logged, and ``sharpness/NAME/LAYER`` for each layer.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    panels = [(name, lines) for name in names if (lines := _lines(history, f"sharpness/{name}"))]
    columns = min(_COLUMNS, len(panels)) or 1
    rows = math.ceil(len(panels) / columns) or 1
    figure: Figure = require("matplotlib.figure", "a plot").Figure(
        figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained"
    )
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for (name, lines), axes in zip(panels, grid, strict=False):
        for label, points in lines.items():
            axes.plot(points.keys(), points.values(), marker=".", label=label)
        if len(lines) > 1 or "" not in lines:
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_title(_TITLES.get(name) or name.replace("_", " "))
        axes.set_xlabel("optimizer step")
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def _lines(history: Mapping[int, Mapping[str, float]], key: str) -> dict[str, dict[int, float]]:
    """Return the points of each layer, by its name; or, where there are no layers, of the measure itself, under ""."""
    lines: dict[str, dict[int, float]] = {}
    for step, values in history.items():
        for name, value in values.items():
            if name == key or name.startswith(f"{key}/"):
                lines.setdefault(name[len(key) + 1 :], {})[step] = value
    if len(lines) > 1:
        lines.pop("", None)
    return lines
