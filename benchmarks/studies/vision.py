"""ResNet, ViT and MLP-Mixer from scratch on Fashion-MNIST: accuracy, curvature, active units, robustness."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure

from benchmarks.harness.cli import Fraction
from benchmarks.harness.errors import choose
from benchmarks.harness.frontier import BASE, BASE_TWICE
from benchmarks.harness.networks import Mixer, small_resnet
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.report import Table, colour, figure, labels_text, legend, machines, publish
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import gain, over
from benchmarks.harness.tasks import Task, VisionTransformer, load_fashion
from benchmarks.harness.training import Experiment, run_experiment, with_measures
from benchmarks.harness.tuning import Method, Place, compare, name_of, thirds
from benchmarks.harness.vision import ATTACKS, measure

METHODS = {
    method.name: method
    for method in (
        BASE,
        BASE_TWICE,
        Method("sam", "SAM, two passes", "sam", thirds(0.1)),
        Method("asam", "ASAM, two passes", "asam", thirds(0.3)),
        Method("momentum-ahead", "ahead along the momentum, one pass", "momentum-sam", thirds(1.0)),
    )
}
"""By name, the base first; each chooses from three settings."""

PLACES = {
    "resnet": Place("fashion_resnet", "sgd", (0.03, 0.1, 0.3)),
    "vit": Place("fashion_vit", "adamw", (1e-3, 3e-3, 1e-2), scale=0.3),
    "mixer": Place("fashion_mixer", "adamw", (1e-3, 3e-3, 1e-2), scale=0.3),
}
"""By the model's name; with AdamW radii are smaller, as in the frontier."""

_MODELS = {
    "resnet": functools.partial(small_resnet, 8, ((8, 16, 2), (16, 32, 2)), stride=2),
    "vit": functools.partial(VisionTransformer, 28, 10, patch=7),
    "mixer": functools.partial(Mixer, width=32, depth=2, patch=7),
}
_BATCH_SIZE = 64


def study(
    data: Path | None = None,
    models: list[str] = list(PLACES),
    methods: list[str] = list(METHODS),
    seeds: list[NonNegativeInt] = [0, 1, 2, 3, 4],
    train_size: PositiveInt = 5000,
    epochs: PositiveInt = 15,
    label_noise: Fraction = 0.0,
    threads: PositiveInt = 1,
    output: Path = Path("results/vision"),
    quick: bool = False,
) -> None:
    """Choose learning rate and radius on validation data, then train every model from every seed and measure it.

    Args:
        data: Folder of Fashion-MNIST's four files; where Debian puts them if left out.
        models: Comma-separated: resnet, vit, mixer.
        methods: Comma-separated; the base is always among them.
        seeds: Of the tests, comma-separated.
        train_size: Training images.
        epochs: Passes over the training images; the learning rate falls to 0 along half a cosine.
        label_noise: Fraction of the training labels to randomise; validation and test labels stay.
        threads: CPU threads.
        output: Folder, continued.
        quick: An epoch of every model on 96 images with the base and SAM, nothing chosen.
    """
    torch.set_num_threads(threads)
    if quick:
        methods, seeds, train_size, epochs = ["sam"], [0], 96, 1
    places = [replace(choose("model", name, PLACES), label_noise=label_noise) for name in models]
    chosen = [choose("method", name, METHODS) for name in dict.fromkeys(["base", *methods])]
    log = open_log(output, restart=quick)
    log.check(
        "(epochs, training images, label noise)",
        lambda row: (
            round(row.settings["epochs"] / row.settings.get("compute", 1)),
            row.examples["train"],
            row.label_noise,
        ),
        lambda row: (epochs, train_size, label_noise),
    )

    def experiment(place: Place, choice: Choice, seed: int = 0, evaluate_on: str = "test") -> Experiment:
        name = place.task.removeprefix("fashion_")
        task = Task(
            place.task, name, classes=10, epochs=epochs, batch_size=32 if quick else _BATCH_SIZE, train_size=train_size,
            load=load_fashion, build_model=_MODELS[name],
        )  # fmt: skip
        return Experiment(
            task, [choice], seed, place.label_noise, round(epochs * choice.compute), task.batch_size,
            train_size=train_size, data=data, evaluate_on=evaluate_on, curves=False,
        )  # fmt: skip

    def train(place: Place, choice: Choice, seed: int, evaluate_on: str) -> Row:
        trial = experiment(place, choice, seed, evaluate_on)
        ((row, run),) = run_experiment(trial, time.process_time)
        if evaluate_on == "validation":
            return row
        return with_measures(row, *measure(run.model, trial.split(), seed))

    compare(
        log,
        places,
        chosen,
        seeds,
        train,
        settings=lambda place, choice: experiment(place, choice).settings(choice),
        tune=not quick,
    )
    render(output)


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = [row for row in Log(folder / "runs.jsonl", must_exist=True).rows if row.evaluated_on == "test"]
    tasks: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        name = BASE.name if name_of(row.optimizer) == row.base else name_of(row.optimizer)
        tasks.setdefault(row.task, {}).setdefault(name, []).append(row)
    for task, methods in tasks.items():
        tasks[task] = {name: methods[name] for name in METHODS if name in methods}
    tables = [_table(task, methods) for task, methods in tasks.items()]
    for task, methods in tasks.items():
        layers = range(len(next(iter(methods.values()))[0].curves["active"]))
        lines = [(name, *(_layer(runs, layer) for layer in layers)) for name, runs in methods.items()]
        headings = ("Method", *(f"Layer {layer + 1}" for layer in layers))
        tables.append(Table(f"{task}: active units by layer, %", headings, lines))
    first = rows[0]
    notes = [
        f"{first.examples['train']} training images, {labels_text(first.label_noise)}, "
        f"{first.settings['epochs']:g} epochs (base-twice: twice as many); accuracy on {first.examples['test']} "
        "test images after the last epoch; ± is the sample standard deviation over n seeds; differences are in points, "
        "paired by seed, with their 95% confidence interval by Student's t",
        "every method chose one of three settings by the validation accuracy of one run with a seed of its own: the "
        "base its learning rate, which the others take, base-twice its own learning rate, the others their radius",
        "cost: processor time of a step over the base's, medians, times the multiple of the epochs",
        "train loss: mean over the last epoch's steps, before each step; lambda_max: largest eigenvalue of the Hessian "
        "of the loss on 512 training images, in evaluation mode",
        "FGSM, corrupted: accuracy on the first 2,000 test images; corrupted: mean over noise, blur, shift, contrast",
        "active: share of pairs of example and unit; for ReLU outputs other than 0, for GELU outputs above 0.17",
        *machines(rows),
    ]
    publish(output or folder, tables, notes, {"vision.png": _plot(tasks)})


def _table(task: str, methods: dict[str, list[Row]]) -> Table:
    base, twice = methods["base"], methods.get("base-twice", [])
    cells = []
    for name, runs in methods.items():
        over_base = "" if runs is base else gain(runs, base).interval()
        against_twice = gain(runs, twice) if name not in ("base", "base-twice") else None
        ratio = gain(runs, base, "seconds_per_step", lambda value, other: value / other)
        cells.append((
            runs[0].optimizer if runs is base else name + runs[0].optimizer.removeprefix(name_of(runs[0].optimizer)),
            str(len(runs)), f"{ratio.mean * runs[0].settings.get('compute', 1.0):.2f}",
            over(runs, "accuracy").spread(".1f", 100), over_base, against_twice.interval() if against_twice else "",
            over(runs, "train_loss").spread(".3f"), over(runs, "lambda_max").spread(".1f"),
            *(over(runs, name).spread(".1f", 100) for name in [f"fgsm {size:g}" for size in ATTACKS]),
            over(runs, "corrupted").spread(".1f", 100), over(runs, "active").spread(".1f", 100),
        ))  # fmt: skip
    headings = (
        "Method", "n", "Cost, x base", "Accuracy, %", "Over the base", "Over base-twice", "Train loss", "lambda_max",
        *(f"FGSM {size:g}, %" for size in ATTACKS), "Corrupted, %", "Active, %",
    )  # fmt: skip
    return Table(task, headings, cells)


def _layer(runs: Sequence[Row], layer: int) -> str:
    shares = [replace(row, metrics={"active": row.curves["active"][layer]}) for row in runs]
    return over(shares, "active").spread(".1f", 100)


def _plot(tasks: dict[str, dict[str, list[Row]]]) -> Figure:
    """Return two panels: what each method gains, and the curvature where it ends."""
    drawn, (axes,) = figure(1, 2, width=4.4, height=3.4)
    for index, method in enumerate(METHODS):
        there = [(place, methods) for place, methods in enumerate(tasks.values()) if method in methods]
        places = [place + 0.1 * (index - 2) for place, _ in there]
        style = {"fmt": "o", "color": colour(index), "label": method}
        if method != BASE.name:
            gains = [gain(methods[method], methods["base"]) for _, methods in there]
            bars = [100 * each.half_width() if each.n > 1 else 0 for each in gains]
            axes[0].errorbar(places, [100 * each.mean for each in gains], bars, **style)
        curvatures = [over(methods[method], "lambda_max") for _, methods in there]
        spreads = [each.sd if each.n > 1 else 0 for each in curvatures]
        axes[1].errorbar(places, [each.mean for each in curvatures], spreads, **style)
    axes[0].axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes[0].set(ylabel="accuracy over the base, points, 95 % interval")
    axes[1].set(ylabel="largest eigenvalue of the Hessian", yscale="log")
    for ax in axes:
        ax.set_xticks(range(len(tasks)), [task.removeprefix("fashion_") for task in tasks])
    legend(drawn)
    return drawn
