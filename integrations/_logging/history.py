"""A picture of what a run logged about sharpness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from samopt.sharpness._measuring.style import colors, finish, new_panels
from samopt.sharpness.presets import PRESETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_history"]

_TITLES = {"sam": "rise in the optimizer's own ascent"}
_NOT_RISES = {"lambda_max": "eigenvalue", "trace": "trace of the Hessian"}
"""Axes of presets that are no rise of the loss."""


def draw_history(history: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> Figure:
    """Return a figure with a panel for each measure over the steps: a line, or one for each of its layers.

    Args:
        history: What was logged at each step, by step.
        names: What to draw; ``sharpness/NAME`` is logged, and ``sharpness/NAME/LAYER`` for each layer.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    panels = [(name, lines) for name in names if (lines := _lines(history, f"sharpness/{name}"))]
    figure, grid = new_panels(max(1, len(panels)))
    for (name, lines), axes in zip(panels, grid, strict=False):
        for (label, points), shade in zip(lines.items(), colors(len(lines)), strict=True):
            axes.plot(list(points), list(points.values()), marker=".", color=shade, label=label or None)
        axes.set_xlabel("optimizer step")
        is_preset = name in _TITLES or name in PRESETS
        axes.set_ylabel(_NOT_RISES.get(name, "rise of the loss" if is_preset else "value"))
        finish(axes, _TITLES.get(name) or name.replace("_", " "))
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
