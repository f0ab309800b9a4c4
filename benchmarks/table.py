"""Summaries as tables, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks.rows import Row
from benchmarks.summary import Estimate, Panel, Summary, summarise

__all__ = ["labels_text", "machines", "markdown", "notes", "terminal_table"]

_HEADINGS = ("Optimizer", "n", "Accuracy, %", "Gain", "Loss", "ms/step", "x base", "Sharpness")


def labels_text(label_noise: float) -> str:
    """Return "clean labels" or "40% random labels".

    Args:
        label_noise: Fraction of the training labels that were randomised.
    """
    return f"{100 * label_noise:g}% random labels" if label_noise else "clean labels"


def terminal_table(panel: Panel) -> Table:
    """Return a panel as a table for rich.

    Args:
        panel: What to show.
    """
    table = Table(title=_title(panel), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in _HEADINGS:
        if heading == "Optimizer":
            table.add_column(heading, overflow="fold", min_width=len(heading))
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for summary in summarise(panel):
        table.add_row(*_cells(summary))
    return table


def markdown(panels: Sequence[Panel]) -> str:
    """Return panels and their notes as Markdown.

    Args:
        panels: What to show.
    """
    parts = []
    for panel in panels:
        lines = [_HEADINGS, ("---", *["---:"] * (len(_HEADINGS) - 1)), *map(_cells, summarise(panel))]
        parts.append(f"**{_title(panel)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(panels))]) + "\n"


def notes(panels: Sequence[Panel]) -> list[str]:
    """Return what a reader must know to read the tables: meanings, settings, machine, warnings.

    Args:
        panels: The tables' panels.
    """
    rows = [row for panel in panels for runs in panel.runs.values() for row in runs]
    radii = sorted({row.settings["sharpness_rho"] for row in rows})
    return [
        "mean ± sample standard deviation over n seeds; gain: accuracy minus the base's for the same seed",
        "loss: training loss, mean over the last epoch's steps, before each step, at unperturbed weights",
        "ms/step: median of a run's optimizer steps; x base: that over the base's for the same seed",
        f"sharpness: rise of the training loss after one ascent step of radius {', '.join(f'{r:g}' for r in radii)}, "
        "the same measure for every optimizer",
        *machines(rows),
        *_warnings(rows),
    ]


def machines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each combination of machine, versions and commit.

    Args:
        rows: Any rows.
    """
    environments = {tuple(sorted(row.environment.items())): row.environment for row in rows}
    return [
        f"measured on {e['device']}, threads: {e['threads']}, {e['dtype']}, torch {e['torch']}, python {e['python']}, "
        f"samopt {e['samopt']} at commit {e['commit']}"
        for e in environments.values()
    ]


def _title(panel: Panel) -> str:
    row = next(iter(panel.runs.values()))[0]
    return (
        f"{panel.task}, {labels_text(panel.label_noise)}: {row.examples['train']} training and "
        f"{row.examples['test']} {panel.evaluated_on} examples, {row.settings['epochs']:g} epochs"
    )


def _cells(summary: Summary) -> tuple[str, ...]:
    return (
        summary.optimizer,
        str(summary.accuracy.n),
        _spread(summary.accuracy, ".1f", 100),
        "" if summary.gain is None else _spread(summary.gain, "+.1f", 100),
        format(summary.train_loss.mean, ".3f"),
        format(1000 * summary.seconds_per_step.mean, ".2f"),
        "" if summary.cost is None else format(summary.cost.mean, ".2f"),
        _spread(summary.sharpness, f".{_decimals(summary.sharpness.mean)}f"),
    )


def _spread(value: Estimate, style: str, factor: float = 1.0) -> str:
    mean = format(factor * value.mean, style)
    return mean if math.isnan(value.sd) else f"{mean} ± {format(factor * value.sd, style.removeprefix('+'))}"


def _decimals(value: float) -> int:
    """Return how many decimals show at least two significant digits."""
    return max(3, 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 3


def _warnings(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.optimizer} with {labels_text(row.label_noise)}, seed {row.seed}, warned: {text}"
        for row in rows
        for text in row.warnings
    ]
