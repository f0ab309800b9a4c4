"""The comparison as a table, and the radius and the divergence during the fine-tune as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.rows import Row
from benchmarks.summary import Estimate, estimate
from benchmarks.table import machines

__all__ = ["markdown", "plot", "terminal_table"]

_HEADINGS = ("Optimizer", "n", "In domain, %", "Gain", "Shifted, %", "Gain", "Loss", "ms/step", "x AdamW")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
_DPI = 115


def terminal_table(rows: Sequence[Row]) -> Table:
    """Return the tests as a table for the terminal: mean and sample standard deviation over the seeds.

    Args:
        rows: Any rows of the comparison.
    """
    table = Table(title="WordNet supersenses: trained on definitions", box=None, padding=(0, 1, 0, 0))
    for heading in _HEADINGS:
        if heading == "Optimizer":
            table.add_column(heading, overflow="fold", min_width=len(heading))
        else:
            table.add_column(heading, justify="right")
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Return the same table in Markdown, with the choice of the settings and what a reader must know.

    Args:
        rows: Any rows of the comparison.
    """
    first, columns = rows[0], ("---", *["---:"] * (len(_HEADINGS) - 1))
    title = (
        f"**{first.examples['train']} training definitions, {first.settings['steps']:g} steps of "
        f"{first.settings['batch_size']:g}; tests of {first.examples['test']} definitions and as many usage examples**"
    )
    parts = [title, _lines(_HEADINGS, columns, *_cells(rows))]
    if choices := _choices(rows):
        parts.append("Validation accuracy, %, of each setting; the one in bold was chosen:")
        parts.append(_lines(("Optimizer", "Settings"), ("---", "---"), *choices))
    notes = [
        "in domain: definitions; shifted: usage examples; accuracy, mean ± sample standard deviation over n seeds",
        "gain: accuracy minus AdamW's for the same seed",
        "loss: training loss, mean over the last tenth of the steps, before each step, at unperturbed weights",
        "ms/step: median over steps that the optimizers took in turns",
        *machines(rows),
        *sorted({f"{row.optimizer}, seed {row.seed}, warned: {text}" for row in rows for text in row.warnings}),
    ]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


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
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.savefig(path, dpi=_DPI)


def _tests(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.evaluated_on == "test":
            found.setdefault(row.optimizer, []).append(row)
    return found


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    tests = _tests(rows)
    base = {row.seed: row for name, found in tests.items() if name.startswith("adamw:") for row in found}
    base_cost = estimate([row.metrics["seconds_per_step"] for row in base.values()]).mean if base else None
    cells: list[tuple[str, ...]] = []
    for name, found in tests.items():
        of = {metric: estimate([row.metrics[metric] for row in found]) for metric in found[0].metrics}
        seconds = of["seconds_per_step"].mean
        cells.append(
            (
                name,
                str(len(found)),
                _percent(of["accuracy"]),
                _gain(found, base, "accuracy"),
                _percent(of["shifted_accuracy"]),
                _gain(found, base, "shifted_accuracy"),
                f"{of['train_loss'].mean:.3f}",
                f"{1000 * seconds:.0f}",
                "" if base_cost is None else f"{seconds / base_cost:.2f}",
            )
        )
    return cells


def _gain(found: Sequence[Row], base: Mapping[int, Row], metric: str) -> str:
    if found[0].optimizer.startswith("adamw:"):
        return ""
    gains = [row.metrics[metric] - base[row.seed].metrics[metric] for row in found if row.seed in base]
    return _percent(estimate(gains), "+") if gains else ""


def _choices(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return each optimizer with the validation accuracies of its settings."""
    chosen = set(_tests(rows))
    tried: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if row.evaluated_on == "validation":
            name, _, setting = row.optimizer.partition(":")
            option, _, value = setting.partition("=")
            text = f"{option} {value}: {100 * row.metrics['accuracy']:.1f}"
            tried.setdefault(name, []).append((float(value), f"**{text}**" if row.optimizer in chosen else text))
    return [(name, ", ".join(text for _, text in sorted(found))) for name, found in tried.items()]


def _lines(*lines: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: Estimate, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f}" + (f" ± {100 * value.sd:.1f}" if value.n > 1 else "")
