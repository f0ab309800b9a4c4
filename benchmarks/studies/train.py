"""Train any optimizers on a task, then show and write the results.

A class of yours is compared with ``--optimizers sgd,sam,my_module:MySAM:rho=0.05``: it is called as
``MySAM(base, model=model, rho=0.05)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.progress import track

from benchmarks.harness.cli import Fraction
from benchmarks.harness.data import EvaluationSet
from benchmarks.harness.environment import select_device
from benchmarks.harness.errors import choose
from benchmarks.harness.optimizers import parse_choices
from benchmarks.harness.report import (
    CONSOLE,
    Table,
    band,
    few_ticks,
    figure,
    labels_text,
    legend,
    machines,
    panel_title,
    publish,
    say,
)
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import Panel, base_runs, gain, over, panels
from benchmarks.harness.tasks import TASKS
from benchmarks.harness.training import SHARED_SETTINGS, Experiment, run_experiment

_HEADINGS = ("Optimizer", "n", "Accuracy, %", "Gain", "Loss", "ms/step", "x base", "Sharpness")
_LEAST_SPAN = 0.05  # of accuracy: a closer look would make much of single test examples


def study(
    task: str = "digits",
    optimizers: list[str] = ["sgd", "sam", "asam", "adamw", "adamw+sam"],
    seeds: list[NonNegativeInt] = [0, 1, 2],
    label_noise: list[Fraction] = [0.0],
    epochs: PositiveInt | None = None,
    batch_size: PositiveInt | None = None,
    train_size: PositiveInt | None = None,
    data: Path | None = None,
    evaluate_on: EvaluationSet = "test",
    sharpness_rho: PositiveFloat = 0.05,
    device: str = "cpu",
    threads: PositiveInt = 1,
    output: Path | None = None,
) -> None:
    """Train every optimizer from every seed with every amount of label noise.

    Args:
        task: digits, digits_vit, fashion_mnist or fashion_small.
        optimizers: Comma-separated: [BASE+]NAME[:SETTING=VALUE...]. BASE is sgd or adamw, NAME a base or one of
            samopt.available(), or a class of yours as module:Class. As in sgd,sam,adamw+asam:rho=0.2:rho_warmup=0.3,
            or sam:only=norm for some parameters only.
        seeds: Comma-separated.
        label_noise: Comma-separated fractions of the training labels to randomise.
        epochs: Passes over the training data; by default the task's number.
        batch_size: Examples a step; by default the task's number.
        train_size: Training examples, drawn by seed; by default the task's number.
        data: Folder with the task's data; by default where Debian puts it.
        evaluate_on: Choose settings on validation, a held-out fifth of the training data.
        sharpness_rho: Radius of the sharpness measure.
        device: As torch names it.
        threads: CPU threads. Small models gain little from a second one.
        output: Folder, continued; by default results/TASK.
    """
    torch.set_num_threads(threads)
    chosen = choose("task", task, TASKS)
    experiment = Experiment(
        task=chosen,
        choices=parse_choices(optimizers),
        seed=0,
        label_noise=0.0,
        epochs=epochs or chosen.epochs,
        batch_size=batch_size or chosen.batch_size,
        train_size=train_size or chosen.train_size,
        data=data,
        evaluate_on=evaluate_on,
        sharpness_rho=sharpness_rho,
        device=select_device(device),
    )
    experiment.split()  # a mistake shows before a file is made
    folder = output or Path("results") / task
    train_missing(experiment, seeds, label_noise, open_log(folder))
    render(folder)


def train_missing(experiment: Experiment, seeds: Sequence[int], label_noise: Sequence[float], log: Log[Row]) -> None:
    """Train what the log lacks, a group (one seed, one amount of label noise) after the other."""
    of_task = {name: getattr(experiment, name) for name in SHARED_SETTINGS}
    log.check(
        f"({', '.join(SHARED_SETTINGS)})",
        lambda row: tuple(row.settings[name] for name in SHARED_SETTINGS),
        lambda row: tuple(
            of_task[name] if row.task == experiment.task.name else row.settings[name] for name in of_task
        ),
    )
    groups = []
    for seed in seeds:
        for noise in label_noise:
            group = replace(experiment, seed=seed, label_noise=noise)
            where = {"task": group.task.name, "seed": seed, "label_noise": noise, "evaluated_on": group.evaluate_on}
            missing = [
                c for c in group.choices if log.find(**where, optimizer=c.label, settings=group.settings(c)) is None
            ]
            if missing:
                groups.append(replace(group, choices=missing))
    for number, group in enumerate(track(groups, "training", console=CONSOLE, disable=not CONSOLE.is_terminal), 1):
        start = time.perf_counter()
        rows = [row for row, _ in run_experiment(group)]
        for row in rows:
            log.add(row)
        accuracies = ", ".join(f"{row.optimizer} {100 * row.metrics['accuracy']:.1f}%" for row in rows)
        where = f"[{number}/{len(groups)}] seed {group.seed}, {labels_text(group.label_noise)}"
        say(f"{where}: {accuracies} ({time.perf_counter() - start:.0f} s)")


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and figures from a folder's rows."""
    found = panels(Log(folder / "runs.jsonl", must_exist=True).rows)
    rows = [row for panel in found for row in panel.rows]
    radii = ", ".join(f"{radius:g}" for radius in sorted({row.settings["sharpness_rho"] for row in rows}))
    notes = [
        "mean ± sample standard deviation over n seeds; gain: accuracy minus the base's for the same seed, in "
        "points, with its 95% confidence interval",
        "loss: training loss, mean over the last epoch's steps, before each step, at unperturbed weights (in one pass: "
        "at the perturbed ones)",
        "ms/step: median of a run's optimizer steps; x base: that over the base's for the same seed",
        f"sharpness: rise of the training loss after one ascent step of radius {radii}, the same measure for every "
        "optimizer",
        *machines(rows),
    ]
    figures = {}
    for task, evaluated_on in dict.fromkeys((panel.task, panel.evaluated_on) for panel in found):
        chosen = [panel for panel in found if (panel.task, panel.evaluated_on) == (task, evaluated_on)]
        suffix = "" if evaluated_on == "test" else f"-{evaluated_on}"
        for quantity in ("accuracy", "sharpness"):
            figures[f"{task}-{quantity}{suffix}.png"] = draw_curves(chosen, quantity)
    publish(output or folder, [_table(panel) for panel in found], notes, figures)


def _table(panel: Panel) -> Table:
    cells = []
    for name, runs in panel.runs.items():
        bases = base_runs(name, panel)
        won = gain(runs, bases) if name.partition(":")[0] != runs[0].base else None
        cost = gain(runs, bases, "seconds_per_step", lambda value, base: value / base)
        sharp = over(runs, "sharpness")
        cells.append(
            (
                name,
                str(len(runs)),
                over(runs, "accuracy").spread(".1f", 100),
                "" if won is None else won.interval(),
                f"{over(runs, 'train_loss').mean:.3f}",
                f"{1000 * over(runs, 'seconds_per_step').mean:.2f}",
                "" if cost is None else f"{cost.mean:.2f}",
                sharp.spread(f".{_decimals(sharp.mean)}f"),
            )
        )
    return Table(panel_title(panel.rows[0]), _HEADINGS, cells)


def _decimals(value: float) -> int:
    """Return how many decimals show at least two significant digits."""
    return max(3, 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 3


def draw_curves(found: Sequence[Panel], quantity: str) -> Figure:
    """Return a panel beside the other: mean over seeds and a band of one standard deviation, after each epoch."""
    drawn, axes = figure(1, len(found))
    names = list(dict.fromkeys(name for panel in found for name in panel.runs))
    for ax, panel in zip(axes[0], found, strict=True):
        for name, runs in panel.runs.items():
            curves = [row.curves[quantity] for row in runs]
            band(ax, range(1, len(curves[0]) + 1), curves, name, names.index(name))
        ax.set(title=labels_text(panel.label_noise), xlabel="epochs")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if quantity == "accuracy":
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, high - _LEAST_SPAN), high)
        else:
            ax.set_yscale("log")
            few_ticks(ax.yaxis)
    first = found[0].rows[0]
    radius = first.settings["sharpness_rho"]
    rise = f"rise of the training loss (nats)\nafter one ascent step of radius {radius:g}"
    axes[0][0].set_ylabel(f"{first.evaluated_on} accuracy (%)" if quantity == "accuracy" else rise)
    seeds = max(len(runs) for panel in found for runs in panel.runs.values())
    drawn.suptitle(f"{first.task}: " + (f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"))
    legend(drawn)
    return drawn
