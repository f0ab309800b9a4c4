"""A LightningModule on Fashion-MNIST with and without the callback, its sharpness in the logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure

from benchmarks.harness.cli import Fraction
from benchmarks.harness.data import make_split
from benchmarks.harness.errors import choose
from benchmarks.harness.report import Table, band, figure, labels_text, legend, machines, publish, say
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import gain, over
from benchmarks.harness.tasks import TASKS
from benchmarks.harness.trainer import MEASURES, METHODS, SHARPNESS_BATCHES, TASK, train

_PICTURED = "sgd+sam"
_QUANTITIES = {
    "accuracy": ("test accuracy", "test accuracy (%)"),
    "worst_case": ("adaptive sharpness, worst case", "rise of the loss (nats)"),
    "average_case": ("adaptive sharpness, average case", "rise of the loss (nats)"),
}


def study(
    methods: list[str] = list(METHODS),
    seeds: list[NonNegativeInt] = [0, 1, 2],
    label_noise: list[Fraction] = [0.0, 0.4],
    epochs: PositiveInt = 10,
    train_size: PositiveInt = 1000,
    batch_size: PositiveInt = 64,
    data: Path | None = None,
    threads: PositiveInt = 1,
    output: Path = Path("results/lightning"),
    quick: bool = False,
) -> None:
    """Train every method from every seed in a Trainer; the methods take turns.

    Args:
        methods: Comma-separated.
        seeds: Comma-separated.
        label_noise: Comma-separated fractions of the training labels to randomise.
        epochs: Passes over the training data.
        train_size: Training examples.
        batch_size: Examples a step.
        data: Folder with Fashion-MNIST; by default Debian's.
        threads: CPU threads.
        output: Folder, continued.
        quick: Two epochs of a few batches of two methods.
    """
    torch.set_num_threads(threads)
    test_size = None
    if quick:
        methods, seeds, label_noise = ["sgd", "sgd+sam"], [0], [0.4]
        epochs, train_size, batch_size, test_size = 2, 128, 32, 256
    for name in methods:
        choose("method", name, METHODS)
    log = open_log(output, restart=quick)
    wanted = (epochs, batch_size, train_size)
    log.check(
        "(epochs, batch size, training examples)",
        lambda row: (row.settings["epochs"], row.settings["batch_size"], row.examples["train"]),
        lambda row: wanted,
    )
    task = TASKS[TASK]
    pool = task.load(data)
    for noise in label_noise:
        for seed in seeds:
            split = make_split(pool, seed, classes=task.classes, train_size=train_size, label_noise=noise)
            split = replace(split, test_inputs=split.test_inputs[:test_size], test_labels=split.test_labels[:test_size])
            for name in methods:
                if log.find(optimizer=name, seed=seed, label_noise=noise) is None:
                    pictured = name == _PICTURED and seed == seeds[0] and noise == label_noise[-1]
                    plot = output / "monitor.png" if pictured else None
                    log.add(train(name, split, seed, noise, epochs, batch_size, plot))
                    last = log.rows[-1].metrics
                    say(
                        f"{labels_text(noise)}, seed {seed}: {name}: accuracy {100 * last['accuracy']:.1f}%, "
                        f"worst case {last['worst_case']:.3f}, {1000 * last['seconds_per_step']:.1f} ms a step"
                    )
    render(output)


def render(folder: Path, output: Path | None = None) -> None:
    """Write the table and the figure from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    cells = []
    for noise in sorted({row.label_noise for row in rows}):
        found = _runs(rows, noise)
        for method, runs in found.items():
            won = gain(runs, found.get(runs[0].base, [])) if runs[0].base != method else None
            cells.append(
                (
                    labels_text(noise),
                    method,
                    str(len(runs)),
                    over(runs, "accuracy").spread(".1f", 100),
                    "" if won is None else won.interval(),
                    *(over(runs, metric).spread(style) for metric, style in
                      (("worst_case", ".3f"), ("average_case", ".4f"), ("train_loss", ".3f"))),
                )
            )  # fmt: skip
    examples, settings = rows[0].examples, rows[0].settings
    worst, noise = MEASURES["worst_case"]["rho"], MEASURES["average_case"]["rho"]
    headings = ("Labels", "Method", "n", "Accuracy, %", "Gain", "Worst case", "Average case", "Train loss")
    notes = [
        f"{examples['train']} training images, {examples['test']} test images, {settings['epochs']:g} epochs, batches "
        f"of {settings['batch_size']:g}; nothing was chosen on this task",
        "mean ± sample standard deviation over n seeds; gain over the base with the same seed, with its "
        "95% confidence interval",
        f"adaptive sharpness on {SHARPNESS_BATCHES} training batches: worst case within radius {worst:g}, average "
        f"case under noise of {100 * noise:g}% of each weight",
        *machines(rows),
    ]
    table = Table("Fashion-MNIST in Lightning", headings, cells, text_columns=(1,))
    publish(output or folder, [table], notes, {"lightning.png": _plot(rows)})


def _plot(rows: list[Row]) -> Figure:
    """Return, for each label noise, accuracy and both kinds of sharpness after each epoch."""
    noises = sorted({row.label_noise for row in rows})
    drawn, grid = figure(len(noises), len(_QUANTITIES), width=4.2, height=3.2)
    for noise, line in zip(noises, grid, strict=True):
        for (quantity, (title, unit)), ax in zip(_QUANTITIES.items(), line, strict=True):
            for index, (method, runs) in enumerate(_runs(rows, noise).items()):
                factor = 100 if quantity == "accuracy" else 1
                curves = [[factor * value for value in row.curves[quantity]] for row in runs]
                band(ax, range(1, len(curves[0]) + 1), curves, method, index)
            ax.set(title=f"{title}\n({labels_text(noise)})", xlabel="epochs", ylabel=unit)
    legend(drawn)
    return drawn


def _runs(rows: list[Row], label_noise: float) -> Mapping[str, list[Row]]:
    """Return the rows of each method, by seed."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.label_noise == label_noise:
            found.setdefault(row.optimizer, []).append(row)
    return found
