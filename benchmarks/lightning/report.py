"""The comparison as a table, and accuracy and sharpness during training as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.lightning.measures import MEASURES
from benchmarks.rows import Row
from benchmarks.summary import Estimate, estimate
from benchmarks.table import labels_text

__all__ = ["markdown", "plot", "terminal_table"]

_HEADINGS = (
    "Labels",
    "Method",
    "n",
    "Accuracy, %",
    "Gain",
    "Worst case",
    "Average case",
    "Train loss",
)
_QUANTITIES = {
    "accuracy": "test accuracy",
    "worst_case": "adaptive sharpness, worst case",
    "average_case": "adaptive sharpness, average case",
}
_COLOURS = ("#000000", "#D55E00", "#CC79A7", "#0072B2", "#009E73", "#E69F00")
_DPI = 115


def terminal_table(rows: Sequence[Row]) -> Table:
    """Return the runs as a table for the terminal: mean and sample standard deviation over the seeds.

    Args:
        rows: Any rows of the comparison.
    """
    table = Table(title="Fashion-MNIST in Lightning", box=None)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in ("Labels", "Method") else "right")
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Return the same table in Markdown, with what was run and where.

    Args:
        rows: Any rows of the comparison.
    """
    lines = [" | ".join(_HEADINGS), " | ".join("---" for _ in _HEADINGS), *map(" | ".join, _cells(rows))]
    row = rows[0]
    where, examples, settings = row.environment, row.examples, row.settings
    worst, noise = MEASURES["worst_case"]["rho"], MEASURES["average_case"]["rho"]
    notes = (
        f"{examples['train']} training images, {examples['test']} test images, {settings['epochs']:g} epochs, batches "
        f"of {settings['batch_size']:g}; mean ± sample standard deviation over n seeds; gain over the base with the "
        "same seed. Nothing was chosen on this task. Adaptive sharpness on four training batches: worst case within "
        f"radius {worst:g}, average case under noise of {100 * noise:g}% of each weight. One process, "
        f"{where['threads']} thread(s) of {where['device']}, torch {where['torch']}."
    )
    return "".join(f"| {line} |\n" for line in lines) + f"\n{notes}\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a figure: for each label noise, accuracy and both kinds of sharpness after each epoch.

    Args:
        rows: Any rows of the comparison.
        path: A PNG file.
    """
    noises = sorted({row.label_noise for row in rows})
    figure = Figure(figsize=(4.2 * len(_QUANTITIES), 3.2 * len(noises) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(noises), len(_QUANTITIES), squeeze=False)
    for noise, line in zip(noises, grid, strict=True):
        for (quantity, title), ax in zip(_QUANTITIES.items(), line, strict=True):
            for colour, (method, runs) in zip(_COLOURS, _runs(rows, noise).items(), strict=False):
                curves = np.array([row.curves[quantity] for row in runs])
                epochs = np.arange(1, curves.shape[1] + 1)
                ax.plot(epochs, curves.mean(0), color=colour, label=method, linewidth=1.6, marker=".")
                ax.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
            ax.set_title(f"{title}\n({labels_text(noise)})", fontsize=10)
            ax.set_xlabel("epoch", fontsize=10)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=10)
    figure.savefig(path, dpi=_DPI)


def _runs(rows: Sequence[Row], label_noise: float) -> dict[str, list[Row]]:
    """Return the rows of each method, by seed."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.label_noise == label_noise:
            found.setdefault(row.optimizer, []).append(row)
    return found


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = []
    for label_noise in sorted({row.label_noise for row in rows}):
        found = _runs(rows, label_noise)
        for method, runs in found.items():
            of = {name: estimate([row.metrics[name] for row in runs]) for name in runs[0].metrics}
            bases = {row.seed: row for row in found.get(runs[0].base, [])}
            pairs = [(row, bases[row.seed]) for row in runs if row.seed in bases and row.base != method]
            gain = [row.metrics["accuracy"] - base.metrics["accuracy"] for row, base in pairs]
            cells.append(
                (
                    labels_text(label_noise),
                    method,
                    str(len(runs)),
                    _spread(of["accuracy"], ".1f", 100),
                    _spread(estimate(gain), "+.1f", 100) if gain else "",
                    _spread(of["worst_case"], ".3f"),
                    _spread(of["average_case"], ".4f"),
                    _spread(of["train_loss"], ".3f"),
                )
            )
    return cells


def _spread(value: Estimate, style: str, factor: float = 1.0) -> str:
    mean = format(factor * value.mean, style)
    return mean if value.n == 1 else f"{mean} ± {format(factor * value.sd, style.removeprefix('+'))}"
