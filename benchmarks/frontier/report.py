"""The comparison as tables and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.table import Table

from benchmarks.frontier.advice import BUDGETS, SLACK, Advice, Outcome, Place, advise, gain, half_width, overall
from benchmarks.frontier.cost import Cost
from benchmarks.frontier.methods import METHODS
from benchmarks.plot import COLOURS
from benchmarks.rows import Row
from benchmarks.table import labels_text, machines

__all__ = ["advice_table", "markdown", "plot"]

_MARKERS = ("o", "s", "^", "D")
_DPI = 115
_NEAR = 0.05  # of accuracy below the base: whoever is worse is named, and does not squeeze the others
_ADVICE = ("Where (accuracy of the base, %)", "Budget", "Use", "Gain over the base", "Its cost")
_HEADINGS = ("Method", "What it does", "n", "Cost, x base", "Accuracy, %", "Gain over the base")


def advice_table(found: Sequence[Place]) -> Table:
    """Return which method to use at which cost, for the terminal.

    Args:
        found: What was measured.
    """
    table = Table(
        title="which variant to use, by training cost", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False
    )
    for heading in _ADVICE:
        table.add_column(heading, overflow="fold")
    for cells in _advice_rows(found):
        table.add_row(*cells)
    return table


def markdown(found: Sequence[Place], rows: Sequence[Row], costs: Sequence[Cost]) -> str:
    """Return every table in Markdown.

    Args:
        found: What was measured.
        rows: The runs that it was measured in.
        costs: What the methods cost.
    """
    parts = ["**Which variant to use, by training cost**", _grid(_ADVICE, _advice_rows(found))]
    for place in found:
        spread = {cost.method: cost for cost in costs if cost.task == place.task}
        cells = [_cells(outcome, place, spread[outcome.method]) for outcome in place.outcomes]
        parts += [f"**{_title(place)}**", _grid(_HEADINGS, cells)]
    return "\n\n".join([*parts, _notes(rows, costs)]) + "\n"


def plot(found: Sequence[Place], costs: Sequence[Cost], path: Path) -> None:
    """Write a figure of accuracy against cost: a row of panels for each task, a column for each label noise.

    Args:
        found: What was measured.
        costs: What the methods cost.
        path: A PNG file.
    """
    tasks = list(dict.fromkeys(place.task for place in found))
    noises = sorted({place.label_noise for place in found if place.label_noise is not None})
    figure = Figure(figsize=(1.0 + 5.0 * len(noises), 1.4 + 3.4 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), len(noises), squeeze=False)
    for place in found:
        ax = axes[tasks.index(place.task)][noises.index(place.label_noise)]
        _draw(ax, place, {cost.method: cost for cost in costs if cost.task == place.task})
    figure.suptitle("test accuracy, mean ± standard deviation over seeds, against measured training cost", fontsize=12)
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=10
    )
    figure.savefig(path, dpi=_DPI)


def _draw(ax: Axes, place: Place, costs: dict[str, Cost]) -> None:
    names = list(METHODS)
    least = place.base.accuracy.mean - _NEAR
    near = [outcome for outcome in place.outcomes if outcome.accuracy.mean >= least]
    below = [f"{o.method} {100 * o.accuracy.mean:.1f}%" for o in place.outcomes if o.accuracy.mean < least]
    if below:
        ax.text(0.02, 0.02, "below: " + ", ".join(below), transform=ax.transAxes, fontsize=9)
    for outcome in near:
        index, cost, accuracy = names.index(outcome.method), costs[outcome.method], outcome.accuracy
        ax.errorbar(
            cost.ratio,
            accuracy.mean,
            xerr=[[max(0.0, cost.ratio - cost.low)], [max(0.0, cost.high - cost.ratio)]],
            yerr=None if math.isnan(accuracy.sd) else accuracy.sd,
            fmt=_MARKERS[index // len(COLOURS) % len(_MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=6,
            elinewidth=1.0,
            label=outcome.method,
        )
    ax.axhline(place.base.accuracy.mean, color="#000000", linewidth=0.8, linestyle=":")
    ax.set_title(_title(place), fontsize=11)
    ax.set_xlabel("training cost, x base", fontsize=10)
    ax.set_ylabel("test accuracy", fontsize=10)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _advice_rows(found: Sequence[Place]) -> list[tuple[str, ...]]:
    summed = [*found, overall(found)] if len(found) > 1 else found
    return [
        (f"{_title(place)} ({_spread(place.base)})", f"{budget:g}x", *_advice(advise(place, budget)))
        for place in summed
        for budget in BUDGETS
    ]


def _advice(advice: Advice) -> tuple[str, str, str]:
    if advice.best is None or advice.gain is None:
        return "the base", "nothing else is this cheap", ""
    gained = _interval(advice.gain.mean, advice.margin)
    cost = f"{advice.best.cost:.2f}x"
    if advice.is_better:
        return advice.best.label, gained, cost
    return "the base", f"nothing surely beats it; nearest: {advice.best.label}, {gained}", cost


def _cells(outcome: Outcome, place: Place, cost: Cost) -> tuple[str, ...]:
    won = gain(outcome, place.base)
    return (
        outcome.label,
        METHODS[outcome.method].summary,
        str(outcome.accuracy.n),
        f"{cost.ratio:.2f} ({cost.low:.2f} to {cost.high:.2f})",
        _spread(outcome),
        "" if outcome is place.base else _interval(won.mean, half_width(won)),
    )


def _notes(rows: Sequence[Row], costs: Sequence[Cost]) -> str:
    notes = [
        "Accuracy: test accuracy after the last epoch, mean ± sample standard deviation over n seeds.",
        "Gain: accuracy minus the base's with the same seed, in points, with its 95% confidence interval by Student's "
        "t. In the first table the interval is widened (Bonferroni) for the number of methods that the best was picked "
        "from, and a method is named only where all of it is above 0.",
        f"Cost: processor time of the method's steps divided by the base's, median (and 20% to 80% quantiles) of "
        f"{costs[0].repetitions} runs of {costs[0].steps} steps each, taken in turns in one process. A method is "
        f"within a budget if its cost is at most {100 * SLACK:g}% above it.",
        "Every setting was chosen from three values on validation data, with a seed of its own: first the base's "
        "learning rate, which all methods use, then each method's radius.",
        *machines(rows),
    ]
    return "\n".join(f"- {note}" for note in notes)


def _title(place: Place) -> str:
    return place.task if place.label_noise is None else f"{place.task}, {labels_text(place.label_noise)}"


def _spread(outcome: Outcome) -> str:
    accuracy = outcome.accuracy
    return f"{100 * accuracy.mean:.1f}" + (f" ± {100 * accuracy.sd:.1f}" if accuracy.n > 1 else "")


def _interval(mean: float, margin: float) -> str:
    if math.isnan(margin):
        return f"{100 * mean:+.1f} (one seed)"
    return f"{100 * mean:+.1f} [{100 * (mean - margin):+.1f}, {100 * (mean + margin):+.1f}]"


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(headings), " | ".join("---" for _ in headings), *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines)
