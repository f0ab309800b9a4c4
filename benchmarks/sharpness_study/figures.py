"""The study as figures: sharpness against accuracy, the loss around the weights, and how the searches converge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from benchmarks.plot import COLOURS
from benchmarks.rows import Row
from benchmarks.sharpness_study.measures import LANDSCAPE_PLACES, MEASURES
from benchmarks.summary import Panel, panels
from benchmarks.table import labels_text

__all__ = ["plot"]

_DPI = 110
_SCATTERED = [each for each in MEASURES if each.name not in ("one_step", "active_units")]
_SPREAD = "mean, least and largest of the seeds"


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the figures and return their paths.

    Args:
        rows: Rows of the study.
        folder: Where to write.

    Raises:
        BenchmarkError: If the rows cannot be averaged.
    """
    found = panels(rows)
    names = list(dict.fromkeys(name for panel in found for name in panel.runs))
    colours = dict(zip(names, COLOURS, strict=False))
    drawn = {
        "accuracy.png": _scatter(found, colours),
        "ascent.png": _ascent(found, colours),
        "landscape.png": _landscape(found, colours),
    }
    for file, figure in drawn.items():
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(
            [lines[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False
        )
        figure.savefig(folder / file, dpi=_DPI)
    return [folder / file for file in drawn]


def _scatter(found: Sequence[Panel], colours: Mapping[str, str]) -> Figure:
    figure = _figure(2.4 * len(_SCATTERED), 2.4 * len(found))
    grid = figure.subplots(len(found), len(_SCATTERED), sharey="row", squeeze=False)
    for line, panel in zip(grid, found, strict=True):
        line[0].set_ylabel(f"{panel.task}\n{labels_text(panel.label_noise)}\ntest accuracy, %", fontsize=8)
        for axes, measure in zip(line, _SCATTERED, strict=True):
            for name, runs in panel.runs.items():
                sharp = [row.metrics[measure.name] for row in runs]
                axes.plot(sharp, [100 * row.metrics["accuracy"] for row in runs], "o", color=colours[name], label=name)
            if any(row.metrics[measure.name] > 0 for runs in panel.runs.values() for row in runs):
                axes.set_xscale("log")
                _few_ticks(axes.xaxis)
            axes.set_xlabel(measure.label.replace(", ", ",\n", 1), fontsize=8)
            axes.tick_params(labelsize=8)
    return figure


def _ascent(found: Sequence[Panel], colours: Mapping[str, str]) -> Figure:
    figure = _figure(max(3.2 * len(found), 5), 3.6)
    for axes, panel in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        steps = len(next(iter(panel.runs.values()))[0].curves["ascent"])
        _bands(axes, panel, colours, "ascent", range(1, steps + 1))
        axes.set_xlabel("ascent steps")
    figure.axes[0].set_ylabel(f"largest rise of the loss, l2, rho 0.05\n({_SPREAD})", fontsize=9)
    return figure


def _landscape(found: Sequence[Panel], colours: Mapping[str, str]) -> Figure:
    figure = _figure(max(3.2 * len(found), 5), 3.6)
    for axes, panel in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _bands(axes, panel, colours, "landscape", LANDSCAPE_PLACES)
        axes.set_xlabel("along a random direction,\nin units of each filter's norm", fontsize=9)
    figure.axes[0].set_ylabel(f"training loss\n({_SPREAD})", fontsize=9)
    return figure


def _bands(axes: Axes, panel: Panel, colours: Mapping[str, str], curve: str, places: Sequence[float]) -> None:
    for name, runs in panel.runs.items():
        values = np.array([row.curves[curve] for row in runs])
        axes.plot(places, values.mean(axis=0), color=colours[name], label=name)
        axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=colours[name], alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    _few_ticks(axes.yaxis)
    axes.set_title(_title(panel), fontsize=10)


def _few_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(panel: Panel) -> str:
    return f"{panel.task}, {labels_text(panel.label_noise)}"
