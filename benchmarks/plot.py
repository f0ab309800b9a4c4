"""Rows as figures: accuracy and sharpness during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.rows import Row
from benchmarks.summary import Panel
from benchmarks.table import labels_text

__all__ = ["COLOURS", "draw", "plot_panels"]

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Okabe and Ito's, which people with any common colour blindness can tell apart, darkest first."""
_DASHES = ("-", "-", "-", "--", "--", "-.", "-.")
_DPI = 115
_LEAST_SPAN = 0.05  # of accuracy: a closer look would make much of single test examples
_QUANTITIES = {
    "accuracy": "{evaluated_on} accuracy",
    "sharpness": "sharpness: rise of training loss\nafter one ascent step, radius {sharpness_rho:g}",
}


def plot_panels(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Write one PNG for each task and quantity, and return their paths.

    Args:
        panels: What to draw; the panels of one task stand side by side.
        folder: Where to write.
    """
    paths = []
    for task, evaluated_on in dict.fromkeys((panel.task, panel.evaluated_on) for panel in panels):
        chosen = [panel for panel in panels if (panel.task, panel.evaluated_on) == (task, evaluated_on)]
        suffix = "" if evaluated_on == "test" else f"-{evaluated_on}"
        for quantity in _QUANTITIES:
            paths.append(folder / f"{task}-{quantity}{suffix}.png")
            figure = draw(chosen, quantity)
            figure.savefig(paths[-1], dpi=_DPI)
    return paths


def draw(panels: Sequence[Panel], quantity: str) -> Figure:
    """Return a figure with one panel beside the other: mean over seeds, a band of one standard deviation.

    Args:
        panels: Of one task.
        quantity: "accuracy" or "sharpness".
    """
    figure = Figure(figsize=(1.2 + 4.4 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    optimizers = list(dict.fromkeys(name for panel in panels for name in panel.runs))
    for panel, ax in zip(panels, axes, strict=True):
        for name, runs in panel.runs.items():
            _draw_runs(ax, runs, quantity, optimizers.index(name))
        ax.set_title(labels_text(panel.label_noise), fontsize=12)
        ax.set_xlabel("epoch", fontsize=11)
        _set_scale(ax, panel, quantity)
    first = next(iter(panels[0].runs.values()))[0]
    axes[0].set_ylabel(_QUANTITIES[quantity].format(evaluated_on=first.evaluated_on, **first.settings), fontsize=11)
    seeds = max(len(runs) for panel in panels for runs in panel.runs.values())
    figure.suptitle(
        f"{first.task}: mean ± standard deviation over {seeds} seeds" if seeds > 1 else f"{first.task}: one seed",
        fontsize=12,
    )
    lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    names = [name for name in optimizers if name in lines]
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(len(names), 5),
        frameon=False,
        fontsize=11,
    )
    return figure


def _draw_runs(ax: Axes, runs: Sequence[Row], quantity: str, index: int) -> None:
    curves = np.array([row.curves[quantity] for row in runs])
    epochs = np.arange(1, curves.shape[1] + 1)
    colour, dashes = COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)]
    mean = curves.mean(axis=0)
    ax.plot(epochs, mean, color=colour, linestyle=dashes, linewidth=1.8, label=runs[0].optimizer)
    if len(runs) > 1:
        sd = curves.std(axis=0, ddof=1)
        ax.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)


def _set_scale(ax: Axes, panel: Panel, quantity: str) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(labelsize=10)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    curves = np.array([row.curves[quantity] for runs in panel.runs.values() for row in runs])
    if quantity == "accuracy":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.yaxis.set_major_locator(MaxNLocator(6))
        later = curves[:, curves.shape[1] // 4 :]  # the steep first quarter would squeeze what there is to compare
        span = max(later.max() - later.min(), _LEAST_SPAN)
        ax.set_ylim(later.max() - 1.05 * span, later.max() + 0.05 * span)
    elif (curves > 0).any():
        # A band of one standard deviation may reach below 0, where a logarithmic axis cannot follow.
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.8 * curves[curves > 0].min())
