"""Train optimizers on a task, then measure how sharp each model is, by several measures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import kendalltau
from torch import Tensor, nn

from benchmarks.harness.cli import Fraction
from benchmarks.harness.data import Split
from benchmarks.harness.errors import choose
from benchmarks.harness.optimizers import parse_choices
from benchmarks.harness.report import (
    Table,
    band,
    colour,
    few_ticks,
    figure,
    labels_text,
    legend,
    machines,
    publish,
    say,
)
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import Panel, estimate, panels
from benchmarks.harness.tasks import TASKS
from benchmarks.harness.training import SHARED_SETTINGS, Experiment, Run, run_experiment, with_measures
from samopt import sharpness

BATCHES, BATCH_SIZE = 4, 64
"""Measured on: that many batches of that many training examples, with the labels that were trained on."""
LANDSCAPE_PLACES = [(point - 10) / 20 for point in range(21)]
"""Where the loss is evaluated along one random direction, in which every filter has the norm of the model's own."""


@dataclass(frozen=True)
class Measure:
    """A measure with its settings: its key among a row's metrics, what tables call it, and the function."""

    name: str
    label: str
    compute: Callable[..., Any]


_WORST = partial(sharpness.worst_case, steps=20)
MEASURES = (
    Measure("one_step", "one step of SAM, rho 0.05", partial(sharpness.worst_case, rho=0.05, steps=1)),
    Measure("worst_case", "worst case, rho 0.05", partial(_WORST, rho=0.05)),
    Measure("worst_case_adaptive", "worst case, adaptive, rho 0.5", partial(_WORST, rho=0.5, adaptive=True)),
    Measure(
        "worst_case_linf",
        "worst case, adaptive l-inf, rho 0.01, normalised logits",
        partial(_WORST, rho=0.01, adaptive=True, norm="linf", normalize_logits=True),
    ),
    Measure(
        "average_case",
        "average case, adaptive, rho 0.05",
        partial(sharpness.average_case, rho=0.05, samples=10, adaptive=True),
    ),
    Measure("lambda_max", "largest Hessian eigenvalue", partial(sharpness.hessian_eigenvalues, tolerance=0.01)),
    Measure("trace", "Hessian trace", partial(sharpness.hessian_trace, samples=10)),
    Measure("active_units", "share of active units", sharpness.active_units),
)
QUANTITIES = {
    "test accuracy, %": "accuracy",
    "loss on the measured examples": "measured_loss",
    "norm of the weights": "weight_norm",
    **{each.label: each.name for each in MEASURES},
}


def study(
    task: str = "digits",
    optimizers: list[str] = ["sgd", "sam", "asam"],
    seeds: list[NonNegativeInt] = [0, 1, 2],
    label_noise: list[Fraction] = [0.0, 0.4],
    epochs: PositiveInt | None = None,
    train_size: PositiveInt | None = None,
    data: Path | None = None,
    threads: PositiveInt = 1,
    output: Path = Path("results/sharpness"),
) -> None:
    """Train every optimizer from every seed, and measure each model.

    Args:
        task: digits, digits_vit, fashion_mnist or fashion_small.
        optimizers: Comma-separated, as for train.
        seeds: Comma-separated.
        label_noise: Comma-separated fractions of the training labels to randomise.
        epochs: Passes over the training data; by default the task's number.
        train_size: Training examples, drawn by seed; by default the task's number.
        data: Folder with the task's data, as for train.
        threads: CPU threads.
        output: Folder, continued; it may hold several tasks.
    """
    torch.set_num_threads(threads)
    chosen, choices = choose("task", task, TASKS), parse_choices(optimizers)
    log = open_log(output)
    shared = (epochs or chosen.epochs, chosen.batch_size, 0.05)
    log.check(
        f"({', '.join(SHARED_SETTINGS)})",
        lambda row: tuple(row.settings[name] for name in SHARED_SETTINGS) if row.task == task else shared,
        lambda row: shared,
    )
    for noise in label_noise:
        for seed in seeds:
            where = {"task": task, "label_noise": noise, "seed": seed}
            missing = [choice for choice in choices if log.find(**where, optimizer=choice.label) is None]
            if missing:
                experiment = Experiment(
                    chosen, missing, seed, noise, shared[0], chosen.batch_size, train_size or chosen.train_size, data,
                    curves=False,
                )  # fmt: skip
                for row, run in run_experiment(experiment):
                    log.add(with_measures(row, *_measure_run(run, experiment.split())))
                say(f"{task}, {labels_text(noise)}, seed {seed}: {', '.join(choice.label for choice in missing)}")
    render(output)


def measure_model(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return every measure of a model in evaluation mode, and the curves behind some of them.

    ``NAME_error`` is a measure's standard error. ``found`` is the share of the first batch's l2 worst case, as a search
    of 100 steps with 3 restarts finds it, that the search of 20 steps found. ``ascent`` is the largest rise of the loss
    within each number of steps, ``landscape`` the loss at each place of ``LANDSCAPE_PLACES``.
    """
    results = {each.name: each.compute(model, sharpness.cross_entropy, batches) for each in MEASURES}
    longer = sharpness.worst_case(model, sharpness.cross_entropy, batches[:1], rho=0.05, steps=100, restarts=3)
    line = sharpness.landscape(model, sharpness.cross_entropy, batches, points=21, radius=0.5)
    worst = results["worst_case"]
    errors = {f"{name}_error": each.standard_error for name, each in results.items()}
    squares = math.fsum(float(weight.detach().double().square().sum()) for weight in model.parameters())
    metrics = {name: each.value for name, each in results.items()}
    metrics |= {name: error for name, error in errors.items() if error is not None}
    metrics |= {
        "found": worst.per_batch[0] / longer.value if longer.value > 0 else 1.0,
        "measured_loss": worst.loss,
        "weight_norm": math.sqrt(squares),
    }
    return metrics, {"ascent": list(worst.curve), "landscape": list(line.losses)}


def _measure_run(run: Run, split: Split) -> tuple[dict[str, float], dict[str, list[float]]]:
    chosen = slice(BATCHES * BATCH_SIZE)
    parts = (torch.split(tensor[chosen], BATCH_SIZE) for tensor in (split.inputs, split.labels))
    return measure_model(run.model, list(zip(*parts, strict=True)))


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and figures from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    found = [row.metrics["found"] for row in rows]
    notes = [
        "mean ± sample standard deviation over the seeds; tau: Kendall's, between the quantity and the test error, "
        "over all models of a table, and over those of one seed, averaged: +1 where sharper is always worse",
        f"measured in evaluation mode on {BATCHES} batches of {BATCH_SIZE} training examples with the labels trained "
        "on, noise included; each batch has its own worst case",
        f"on each model's first batch the l2 search of 20 steps found {100 * min(found):.1f} to "
        f"{100 * max(found):.1f} % (median {100 * statistics.median(found):.2f} %) of what 100 steps with 3 restarts "
        "found",
        *machines(rows),
    ]
    publish(output or folder, tables(rows), notes, _figures(panels(rows)))


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each task and amount of label noise."""
    made = []
    for panel in panels(rows):
        first, names = panel.rows[0], list(panel.runs)
        seeds = max(len(runs) for runs in panel.runs.values())
        title = (
            f"{panel.task}, {labels_text(panel.label_noise)}: {first.examples['train']} training examples, "
            f"{first.settings['epochs']:g} epochs, {seeds} seeds"
        )
        lines = []
        for label, metric in QUANTITIES.items():
            factor = 100 if metric == "accuracy" else 1
            of = [estimate(factor * row.metrics[metric] for row in runs) for runs in panel.runs.values()]
            cells = [f"{each.mean:.3g}" + (f" ± {each.sd:.2g}" if each.n > 1 else "") for each in of]
            taus = ["", ""] if metric == "accuracy" else [f"{tau:+.2f}" for tau in agreement(panel, metric)]
            lines.append((label, *cells, *taus))
        made.append(Table(title, ("", *names, "tau, all", "tau, same seed"), lines))
    return made


def agreement(panel: Panel, metric: str) -> tuple[float, float]:
    """Return how well a metric orders models by test error, as Kendall's tau-b: 1 for the same order, -1 reversed.

    Over all models of the panel; and the mean over seeds of tau among models of one seed, with the same data and
    initial weights. Nan where there is nothing to order.
    """

    def tau(rows: Sequence[Row]) -> float:
        errors = [-row.metrics["accuracy"] for row in rows]
        return float(kendalltau([row.metrics[metric] for row in rows], errors).statistic) if len(rows) > 1 else math.nan

    seeds = sorted({row.seed for row in panel.rows})
    return tau(panel.rows), statistics.fmean(tau([row for row in panel.rows if row.seed == seed]) for seed in seeds)


def _figures(found: Sequence[Panel]) -> dict[str, Figure]:
    names = list(dict.fromkeys(name for panel in found for name in panel.runs))
    scattered = [each for each in MEASURES if each.name not in ("one_step", "active_units")]
    scatter, grid = figure(len(found), len(scattered), width=2.4, height=2.4, sharey="row")
    for line, panel in zip(grid, found, strict=True):
        line[0].set_ylabel(f"{panel.task}\n{labels_text(panel.label_noise)}\ntest accuracy, %", fontsize=8)
        for ax, measure in zip(line, scattered, strict=True):
            for name, runs in panel.runs.items():
                sharp, accuracy = ([row.metrics[metric] for row in runs] for metric in (measure.name, "accuracy"))
                ax.plot(sharp, [100 * value for value in accuracy], "o", color=colour(names.index(name)), label=name)
            ax.set_xlabel(measure.label.replace(", ", ",\n", 1), fontsize=8)
            if any(row.metrics[measure.name] > 0 for row in panel.rows):
                ax.set_xscale("log")
                few_ticks(ax.xaxis)
                if ax.get_xlim()[1] < 4 * ax.get_xlim()[0]:  # too narrow for ticks at 1, 2 and 5
                    ax.xaxis.set_major_locator(MaxNLocator(3))
    scatter.suptitle("test accuracy against sharpness, a point for each model; worst and average cases in nats")
    steps = list(range(1, len(found[0].rows[0].curves["ascent"]) + 1))
    drawn = {
        "accuracy.png": scatter,
        "ascent.png": _lines(found, names, "ascent", steps, "ascent steps", "largest rise of the loss (nats)"),
        "landscape.png": _lines(
            found, names, "landscape", LANDSCAPE_PLACES, "along a random direction,\nin units of each filter's norm",
            "training loss (nats)",
        ),
    }  # fmt: skip
    for each in drawn.values():
        legend(each)
    return drawn


def _lines(
    found: Sequence[Panel], names: list[str], curve: str, places: Sequence[float], xlabel: str, ylabel: str
) -> Figure:
    drawn, axes = figure(1, len(found), width=3.2, height=3.0)
    for ax, panel in zip(axes[0], found, strict=True):
        for name, runs in panel.runs.items():
            band(ax, places, [row.curves[curve] for row in runs], name, names.index(name))
        ax.set(title=f"{panel.task}, {labels_text(panel.label_noise)}", xlabel=xlabel, yscale="log")
        few_ticks(ax.yaxis)
    axes[0][0].set_ylabel(f"{ylabel}\n(mean ± standard deviation)")
    return drawn
