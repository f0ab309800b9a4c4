"""The comparison as a table, and the radius and the divergence during the fine-tune as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.rows import Row
from benchmarks.summary import Estimate, estimate

__all__ = ["markdown", "plot", "terminal_table"]

_HEADINGS = ("Optimizer", "n", "Definitions, %", "Usage examples, %", "Train loss", "ms/step", "x AdamW")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
_DPI = 115


def terminal_table(rows: Sequence[Row]) -> Table:
    """Return the tests as a table for the terminal: mean and sample standard deviation over the seeds.

    Args:
        rows: Any rows of the comparison.
    """
    table = Table(title="WordNet supersenses: trained on definitions", box=None)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "Optimizer" else "right")
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Return the same table in Markdown.

    Args:
        rows: Any rows of the comparison.
    """
    lines = [" | ".join(_HEADINGS), " | ".join("---" for _ in _HEADINGS), *map(" | ".join, _cells(rows))]
    return "".join(f"| {line} |\n" for line in lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a figure of the divergence and the radius at each step of the trust-region optimizers' tests.

    Args:
        rows: Any rows of the comparison.
        path: A PNG file.
    """
    runs = {name: found for name, found in _tests(rows).items() if found[0].curves.get("distance")}
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for ax, quantity, title in zip(
        axes, ("distance", "radius"), ("divergence d (nats)", "radius r = min(scale d, bound)"), strict=True
    ):
        for colour, (name, found) in zip(_COLOURS, runs.items(), strict=False):
            curves = np.array([row.curves[quantity] for row in found])
            steps = np.arange(1, curves.shape[1] + 1)
            ax.plot(steps, curves.mean(0), color=colour, label=name, linewidth=1.6)
            ax.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
        ax.set_title(title, fontsize=12)
        ax.set_xlabel("step", fontsize=11)
        ax.set_yscale("log")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
    figure.savefig(path, dpi=_DPI)


def _tests(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.evaluated_on == "test":
            found.setdefault(row.optimizer, []).append(row)
    return found


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    tests = _tests(rows)
    base = next((found for name, found in tests.items() if name.startswith("adamw:")), None)
    base_cost = None if base is None else estimate([row.metrics["seconds_per_step"] for row in base]).mean
    cells: list[tuple[str, ...]] = []
    for name, found in tests.items():
        of = {metric: estimate([row.metrics[metric] for row in found]) for metric in found[0].metrics}
        seconds = of["seconds_per_step"].mean
        cells.append(
            (
                name,
                str(len(found)),
                _percent(of["accuracy"]),
                _percent(of["shifted_accuracy"]),
                f"{of['train_loss'].mean:.3f}",
                f"{1000 * seconds:.0f}",
                "" if base_cost is None else f"{seconds / base_cost:.2f}",
            )
        )
    return cells


def _percent(value: Estimate) -> str:
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.sd:.1f}" if value.n > 1 else "")
