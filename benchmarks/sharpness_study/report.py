"""The study as tables: every measure for every optimizer, and whether it orders the models by test error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from scipy.stats import kendalltau  # type: ignore[import-untyped]

from benchmarks.rows import Row
from benchmarks.sharpness_study.measures import MEASURES
from benchmarks.sharpness_study.study import BATCH_SIZE, BATCHES
from benchmarks.summary import Panel, estimate, panels
from benchmarks.table import labels_text, machines

__all__ = ["QUANTITIES", "agreement", "markdown"]


def _metric(name: str, factor: float, row: Row) -> float:
    return factor * row.metrics[name]


QUANTITIES: dict[str, Callable[[Row], float]] = {
    "test accuracy, %": partial(_metric, "accuracy", 100.0),
    "loss on the measured examples": partial(_metric, "measured_loss", 1.0),
    "norm of the weights": partial(_metric, "weight_norm", 1.0),
    **{each.label: partial(_metric, each.name, 1.0) for each in MEASURES},
}
"""The lines of a table: what to read from a row."""


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for each task and amount of label noise, and what a reader must know to read them.

    Args:
        rows: Rows of the study.

    Raises:
        BenchmarkError: If the rows cannot be averaged.
    """
    tables = ["\n".join(_table(panel)) for panel in panels(rows)]
    return "\n\n".join([*tables, "\n".join(f"- {note}" for note in _notes(rows))]) + "\n"


def agreement(panel: Panel, read: Callable[[Row], float]) -> tuple[float, float]:
    """Return how well a quantity orders models by test error, as Kendall's tau-b: 1 for the same order, -1 reversed.

    Args:
        panel: The models.
        read: The quantity.

    Returns:
        Tau over all models of the panel; and, among models of one seed (the same data and initial weights), the mean
        of tau over the seeds. Nan where there is nothing to order.
    """
    rows = [row for runs in panel.runs.values() for row in runs]
    seeds = sorted({row.seed for row in rows})
    return _tau(rows, read), statistics.fmean(_tau([row for row in rows if row.seed == seed], read) for seed in seeds)


def _tau(rows: Sequence[Row], read: Callable[[Row], float]) -> float:
    if len(rows) < 2:
        return math.nan
    return float(kendalltau([read(row) for row in rows], [-row.metrics["accuracy"] for row in rows]).statistic)


def _table(panel: Panel) -> Iterator[str]:
    names = list(panel.runs)
    first = panel.runs[names[0]][0]
    seeds = max(len(runs) for runs in panel.runs.values())
    yield (
        f"**{panel.task}, {labels_text(panel.label_noise)}: {first.examples['train']} training examples, "
        f"{first.settings['epochs']:g} epochs, {seeds} seeds**\n"
    )
    yield f"| | {' | '.join(names)} | tau, all | tau, same seed |"
    yield f"|---|{'---:|' * (len(names) + 2)}"
    for label, read in QUANTITIES.items():
        cells = [_cell([read(row) for row in panel.runs[name]]) for name in names]
        taus = (
            [f"{tau:+.2f}" for tau in agreement(panel, read)]
            if read is not QUANTITIES["test accuracy, %"]
            else ["", ""]
        )
        yield f"| {label} | {' | '.join([*cells, *taus])} |"


def _cell(values: Sequence[float]) -> str:
    of = estimate(values)
    return f"{of.mean:.3g}" + (f" ± {of.sd:.2g}" if of.n > 1 else "")


def _notes(rows: Sequence[Row]) -> list[str]:
    found = [row.metrics["found"] for row in rows]
    return [
        "mean ± sample standard deviation over the seeds; tau: Kendall's, between the quantity and the test error, "
        "over all models of a table, and over those of one seed, averaged: +1 where sharper is always worse",
        f"measured in evaluation mode on {BATCHES} batches of {BATCH_SIZE} training examples with the labels trained "
        "on, noise included; each batch has its own worst case",
        f"on each model's first batch the l2 search of 20 steps found {100 * min(found):.1f} to "
        f"{100 * max(found):.1f} % (median {100 * statistics.median(found):.2f} %) of what 100 steps with 3 restarts "
        "found",
        *machines(rows),
    ]
