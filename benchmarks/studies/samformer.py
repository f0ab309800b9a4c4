"""Time series: SAMformer on ETTh1, four horizons, Adam against SAM, ASAM and momentum ahead."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from benchmarks.harness.data import stream_seed
from benchmarks.harness.environment import describe, now
from benchmarks.harness.errors import choose
from benchmarks.harness.loop import take_step
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.report import Table, colour, figure, legend, machines, publish
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.samformer import INPUT_HOURS, Samformer, read_series, windows
from benchmarks.harness.statistics import Estimate, estimate, gain, over, pairs
from benchmarks.harness.training import build_model, epoch_order, rounded
from benchmarks.harness.tuning import Method, Place, compare, name_of, thirds

METHODS = {
    method.name: method
    for method in (
        Method("adam", "the base"),
        Method("adam-twice", "the base with twice the epochs", compute=2.0),
        Method("sam", "SAM, two passes", "sam", thirds(1.0)),
        Method("asam", "ASAM, two passes", "asam", thirds(3.0)),
        Method("momentum-ahead", "ahead along the momentum, one pass", "momentum-sam", thirds(1.0)),
    )
}
"""By name, the base first. Each chooses from nine settings: Adam of learning rates, the others of three and three."""

_RATES = tuple(float(f"{rate:.2g}") for rate in np.logspace(-4, -2, 9))
_EVALUATION_BATCH = 512


def study(
    data: Path | None = None,
    horizons: list[PositiveInt] = [96, 192, 336, 720],
    methods: list[str] = list(METHODS),
    seeds: list[NonNegativeInt] = [0, 1, 2, 3, 4],
    epochs: PositiveInt = 5,
    batch_size: PositiveInt = 256,
    threads: PositiveInt = 1,
    output: Path = Path("results/samformer"),
    quick: bool = False,
) -> None:
    """Choose learning rate and radius of every method on validation data, then test from every seed.

    Args:
        data: The file ETTh1.csv, from https://github.com/zhouhaoyi/ETDataset (folder ETT-small).
        horizons: Hours to forecast, comma-separated.
        methods: Comma-separated; adam is always among them.
        seeds: Of the tests, comma-separated.
        epochs: Passes over the training windows; the learning rate falls to 0 along half a cosine.
        batch_size: Windows a step.
        threads: CPU threads.
        output: Folder, continued.
        quick: A few steps of every method at the shortest horizon, nothing chosen.
    """
    torch.set_num_threads(threads)
    if quick:
        horizons, seeds, epochs = [96], [0], 1
    chosen = [choose("method", name, METHODS) for name in dict.fromkeys(["adam", *methods])]
    forecasts = Forecasts(read_series(data), epochs, batch_size, steps=4 if quick else None)
    log = open_log(output, restart=quick)
    log.check(
        "(epochs, batch size)",
        lambda row: (row.settings["epochs"], row.settings["batch_size"]),
        lambda row: (epochs, batch_size),
    )
    compare(
        log,
        [Place(f"ETTh1-{horizon}", "adam", _RATES, joint=True) for horizon in horizons],
        chosen,
        seeds,
        forecasts.train,
        settings=forecasts.settings,
        tune=not quick,
        metric="mse",
        sign=-1,
    )
    render(output)


class Forecasts:
    """Makes the runs.

    Args:
        series: The three parts of the series.
        epochs: Passes over the training windows.
        batch_size: Windows a step; an incomplete last batch of an epoch is left out.
        steps: Steps of an epoch; None for all windows.
    """

    def __init__(self, series: dict[str, Tensor], epochs: int, batch_size: int, steps: int | None = None) -> None:
        self._series, self._epochs, self._batch_size, self._steps = series, epochs, batch_size, steps

    def settings(self, place: Place, choice: Choice) -> dict[str, float]:
        """Return what a row says about its settings."""
        return {**choice.settings, "epochs": self._epochs, "batch_size": self._batch_size}

    def train(self, place: Place, choice: Choice, seed: int, evaluate_on: str) -> Row:
        """Train a model with one choice from one seed, and measure it after the last epoch."""
        horizon = int(place.task.rpartition("-")[2])
        past, future = windows(self._series["train"], horizon)
        tests = windows(self._series[evaluate_on], horizon)
        model = build_model(lambda: Samformer(horizon), seed)
        optimizer = choice.build(model)
        per_epoch = min(len(past) // self._batch_size, self._steps or len(past))
        epochs = round(self._epochs * choice.compute)
        schedulers = choice.schedulers(optimizer, epochs * per_epoch)
        seconds, curve = [], []
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("default")
            torch.manual_seed(stream_seed(seed, "samformer"))
            for epoch in range(epochs):
                losses = []
                for batch in torch.split(epoch_order(len(past), seed, epoch), self._batch_size)[:per_epoch]:
                    inputs, targets = past[batch], future[batch]
                    start = time.process_time()
                    losses.append(take_step(optimizer, lambda x=inputs, y=targets: functional.mse_loss(model(x), y)))
                    seconds.append(time.process_time() - start)
                    for scheduler in schedulers:
                        scheduler.step()
                curve.append(float(torch.stack(losses).double().mean()))
        metrics = _errors(model, *tests) | {"train_loss": curve[-1], "seconds_per_step": statistics.median(seconds)}
        return Row(
            place.task, choice.label, "adam", seed, 0.0, evaluate_on, self.settings(place, choice),
            {"train": len(past), "test": len(tests[0])}, metrics, rounded({"train_loss": curve}),
            sorted({str(warning.message) for warning in caught}), describe(), now(),
        )  # fmt: skip


@torch.no_grad()
def _errors(model: Samformer, past: Tensor, future: Tensor) -> dict[str, float]:
    """Return mean squared and mean absolute error over all windows, channels and hours."""
    squared, absolute = 0.0, 0.0
    for inputs, targets in zip(past.split(_EVALUATION_BATCH), future.split(_EVALUATION_BATCH), strict=True):
        difference = (model(inputs) - targets).double()
        squared += float(difference.square().sum())
        absolute += float(difference.abs().sum())
    return {"mse": squared / future.numel(), "mae": absolute / future.numel()}


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = [row for row in Log(folder / "runs.jsonl", must_exist=True).rows if row.evaluated_on == "test"]
    tasks: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        tasks.setdefault(row.task, {}).setdefault(name_of(row.optimizer), []).append(row)
    made = []
    headings = ("Method", "Chosen", "n", "MSE", "MAE", "MSE less Adam's", "Cost, x Adam")
    for task, methods in tasks.items():
        base = methods["adam"]
        cells = []
        for name, runs in methods.items():
            won = "" if name == "adam" else gain(runs, base, "mse").interval("+.4f", 1)
            spread = [over(runs, metric).spread(".4f") for metric in ("mse", "mae")]
            chosen = runs[0].optimizer.partition(":")[2].replace(":", ", ")
            cells.append((name, chosen, str(len(runs)), *spread, won, f"{_cost(runs, base):.2f}"))
        horizon = task.rpartition("-")[2]
        made.append(Table(f"ETTh1, {horizon} hours from {INPUT_HOURS}", headings, cells, text_columns=(1,)))
    if len(tasks) > 1:
        cells = []
        for name in [name for name in METHODS if all(name in methods for methods in tasks.values())]:
            won = _mean_gain([(methods[name], methods["adam"]) for methods in tasks.values()])
            mean = statistics.fmean(over(methods[name], "mse").mean for methods in tasks.values())
            cost = statistics.fmean(_cost(methods[name], methods["adam"]) for methods in tasks.values())
            shown = "" if name == "adam" else won.interval("+.4f", 1)
            cells.append((name, METHODS[name].summary, f"{mean:.4f}", shown, f"{cost:.2f}"))
        headings = ("Method", "What it does", "MSE", "MSE less Adam's", "Cost, x Adam")
        made.insert(0, Table("Mean over the horizons", headings, cells, text_columns=(1,)))
    notes = [
        "test errors of standardised series after the last epoch, mean ± sample standard deviation over n seeds; less "
        "than Adam's is better; the difference is paired by seed, with its 95% confidence interval",
        "every method chose one of nine settings by the validation MSE of one run with a seed of its own: Adam of nine "
        "learning rates, the others of three learning rates and three radii",
        "cost: processor time of a step over Adam's, medians, times the multiple of the epochs",
        *machines(rows),
    ]
    publish(output or folder, made, notes, {"samformer.png": _plot(tasks)})


def _cost(runs: Sequence[Row], base: Sequence[Row]) -> float:
    ratio = gain(runs, base, "seconds_per_step", lambda value, other: value / other)
    return ratio.mean * runs[0].settings.get("compute", 1.0)


def _mean_gain(groups: Sequence[tuple[list[Row], list[Row]]]) -> Estimate:
    """Return the mean over horizons, seed by seed, of the MSE less the base's, over seeds that all horizons have."""
    by_seed: dict[int, list[float]] = {}
    for runs, base in groups:
        for row, other in pairs(runs, base):
            by_seed.setdefault(row.seed, []).append(row.metrics["mse"] - other.metrics["mse"])
    return estimate(statistics.fmean(values) for values in by_seed.values() if len(values) == len(groups))


def _plot(tasks: dict[str, dict[str, list[Row]]]) -> Figure:
    """Return the test MSE of every method at every horizon."""
    drawn, axes = figure(1, 1, width=6.0, height=4.0)
    for index, name in enumerate(METHODS):
        points = [
            (place, over(methods[name], "mse")) for place, methods in enumerate(tasks.values()) if name in methods
        ]
        spread = [0.0 if math.isnan(each.sd) else each.sd for _, each in points]
        places = [place + 0.08 * (index - 2) for place, _ in points]
        means = [each.mean for _, each in points]
        axes[0][0].errorbar(places, means, spread, fmt="o", color=colour(index), label=name)
    axes[0][0].set_xticks(range(len(tasks)), [f"{task.rpartition('-')[2]} hours" for task in tasks])
    axes[0][0].set(
        title="SAMformer on ETTh1: mean ± standard deviation over the seeds",
        xlabel="forecast",
        ylabel="test error (squared, of standardised series)",
    )
    legend(drawn)
    return drawn
