"""Train a small ConvNet on real digits with and without SAM, clean and wrong labels; three minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure

from benchmarks.harness.data import Split
from benchmarks.harness.optimizers import parse_choices
from benchmarks.harness.report import Table, figure, labels_text, machines, publish, say
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import Estimate, Panel, base_runs, estimate, gain, over, panels
from benchmarks.harness.tasks import TASKS
from benchmarks.harness.training import Experiment, Run, run_experiment, with_measures
from benchmarks.studies import train
from samopt import sharpness

PASSES = {"sgd": 1, "momentum-sam": 1, "sam": 2, "asam": 2, "adamw": 1, "adamw+sam": 2}
"""The optimizers, with their default radii, and the forward and backward passes that a step of each takes."""
NOISE = 0.4
DRAWN = {"sgd": "SGD", "momentum-sam": "MomentumSAM", "sam": "SAM"}
"""Whose landscapes are drawn, and what the drawing calls them."""
PLACES, REACH, PLANE, EXAMPLES = 21, 0.5, 0, 256
"""The landscape: points along each direction, how far they go, the seed of the directions, training examples."""
VALLEY = 0.5  # the rise of the loss that the drawing's white line and the notes take for the valley's rim
WIDTH = 79  # of the terminal's 80 columns: some tools count "±" as two

_HEADINGS = ("optimizer", "passes", "accuracy, %", "gain, points", "ms/step", "cost", "sharpness")


def study(
    seeds: list[NonNegativeInt] = [0, 1, 2],
    epochs: PositiveInt = 20,
    output: Path = Path("results/demo"),
) -> None:
    """Train SGD, one-pass SAM, SAM and ASAM around it, AdamW, and SAM around AdamW.

    Args:
        seeds: Comma-separated.
        epochs: Passes over the training data.
        output: Folder, replaced.
    """
    torch.set_num_threads(1)
    log = open_log(output, restart=True)
    task, choices = TASKS["digits"], parse_choices(list(PASSES))
    for number, seed in enumerate(seeds):
        for noise in (0.0, NOISE):
            start = time.perf_counter()
            experiment = Experiment(task, choices, seed, noise, epochs, task.batch_size)
            for row, run in run_experiment(experiment):
                surroundings = {}
                if noise and row.optimizer in DRAWN:
                    surroundings = {"landscape": _landscape(run, experiment.split())}
                log.add(with_measures(row, {}, surroundings))
            where = f"[{2 * number + (2 if noise else 1)}/{2 * len(seeds)}] seed {seed}, {labels_text(noise)}"
            say(f"{where}: {len(choices)} models trained ({time.perf_counter() - start:.0f} s)")
    render(output)


def _landscape(run: Run, split: Split) -> list[float]:
    """Return the training loss on a plane around the weights, line by line, in evaluation mode."""
    batch = (split.inputs[:EXAMPLES], split.labels[:EXAMPLES])
    plane = sharpness.landscape(
        run.model, sharpness.cross_entropy, [batch], dimensions=2, points=PLACES, radius=REACH, seed=PLANE,
        progress=False,
    )  # fmt: skip
    return np.ravel(plane.losses).tolist()


def render(folder: Path, output: Path | None = None) -> None:
    """Write the table, the landscapes and the curves of a folder's rows, and say in words what was gained."""
    found = panels(Log(folder / "runs.jsonl", must_exist=True).rows)
    notes = [
        "accuracy: on test images, mean ± standard deviation over the seeds; gain: over the base (sgd or adamw) with "
        "the same seed, with its 95% interval",
        "ms/step: median over a run's steps; cost: that over the base's, same seed",
        "sharpness: rise of the training loss after one step of length 0.05 uphill",
        _valley(found[-1]),
        "every optimizer has its default radius: nothing was tuned",
        *machines([row for panel in found for row in panel.rows]),
    ]
    drawn = {"landscape.png": draw_landscapes(found[-1])}
    drawn |= {f"{quantity}.png": train.draw_curves(found, quantity) for quantity in ("accuracy", "sharpness")}
    publish(output or folder, [_table(panel) for panel in found], notes, drawn, width=WIDTH, conclusion=_words(found))


def _table(panel: Panel) -> Table:
    cells = []
    for name, runs in panel.runs.items():
        bases = base_runs(name, panel)
        won, cost = gain(runs, bases), _cost(runs, bases)
        cells.append(
            (
                name,
                str(PASSES[name]),
                over(runs, "accuracy").spread(".1f", 100),
                "" if won is None or name == runs[0].base else _interval(won),
                f"{1000 * over(runs, 'seconds_per_step').mean:.2f}",
                cost,
                f"{over(runs, 'sharpness').mean:.3f}",
            )
        )
    first = panel.rows[0]
    title = (
        f"{labels_text(panel.label_noise)}: {first.examples['train']} training and {first.examples['test']} test "
        f"images, {first.settings['epochs']:g} epochs, {len(runs)} seed{'s' * (len(runs) > 1)}"
    )
    return Table(title, _HEADINGS, cells)


def _cost(runs: Sequence[Row], bases: Sequence[Row]) -> str:
    times = gain(runs, bases, "seconds_per_step", lambda value, base: value / base)
    return "" if times is None else f"{times.mean:.2f}"


def _words(found: Sequence[Panel]) -> str:
    """Return a sentence: what SAM gained over SGD in two passes and in one, and at what cost."""
    clean, noisy = found[0].runs, found[-1].runs
    said, also = [], []
    for name, form in (("sam", "SAM (two passes"), ("momentum-sam", "MomentumSAM (one pass")):
        on_noisy, on_clean = (gain(of[name], of["sgd"]) for of in (noisy, clean))
        assert on_noisy is not None and on_clean is not None
        said.append(
            f"{form}, rho={noisy[name][0].settings['rho']:g}) gained {_interval(on_noisy)} points of test accuracy "
            f"over SGD for {_cost(noisy[name], noisy['sgd'])} times the time of a step"
        )
        also.append(_interval(on_clean))
    doubt = "in brackets 95% intervals: one that holds 0 proves no gain"
    if len(noisy["sgd"]) == 1:
        doubt = "one seed proves nothing"
    return f"With {labels_text(NOISE)}, {said[0]}, and {said[1]}; with clean labels {also[0]} and {also[1]} ({doubt})."


def _interval(won: Estimate, style: str = "+.1f") -> str:
    return f"{100 * won.mean:{style}}" if won.n == 1 else won.interval(style)


def _valley(panel: Panel) -> str:
    """Return a note: how much of the plane is valley, over all seeds."""
    shares = []
    for name in DRAWN:
        rises = [
            np.array(row.curves["landscape"]) - row.curves["landscape"][PLACES**2 // 2] for row in panel.runs[name]
        ]
        shares.append(f"{name} {estimate(float((rise < VALLEY).mean()) for rise in rises).spread('.0f', 100)} %")
    return (
        f"landscape.png: the first seed, {labels_text(panel.label_noise)}; share of the plane where the training loss "
        f"rises by less than {VALLEY:g}, over all seeds: {', '.join(shares)}"
    )


def draw_landscapes(panel: Panel) -> Figure:
    """Return how much the training loss rises around the models of the first seed, in one plane and one scale."""
    seed = min(row.seed for row in panel.rows)
    rows = {label: next(row for row in panel.runs[name] if row.seed == seed) for name, label in DRAWN.items()}
    places = np.linspace(-REACH, REACH, PLACES)
    drawn, axes = figure(1, len(rows), width=3.0, height=3.1, sharey=True)
    levels = [0, 0.1, 0.25, VALLEY, 1, 1.5, 2, 3, 4]
    for ax, (label, row) in zip(axes[0], rows.items(), strict=True):
        losses = np.reshape(row.curves["landscape"], (PLACES, PLACES)).T
        centre = losses[PLACES // 2, PLACES // 2]
        shades = ax.contourf(places, places, losses - centre, levels=levels, cmap="cividis", extend="both")
        rim = ax.contour(places, places, losses - centre, levels=[VALLEY], colors="white", linewidths=2)
        ax.clabel(rim, fmt=lambda level: f"+{level:g}")
        ax.plot(0, 0, "w+", markersize=10)
        said = f"loss at + {centre:.2f}, test accuracy {100 * row.metrics['accuracy']:.1f} %"
        ax.set_title(f"{label}\n{said}", fontsize=9.5)
        ax.set(xlabel="first direction", aspect="equal")
        ax.grid(False)
    axes[0][0].set_ylabel("second direction\n(1: as long as each filter's weights)")
    drawn.colorbar(shades, ax=axes[0].tolist(), label="rise of the training loss, nats", ticks=levels)
    return drawn
