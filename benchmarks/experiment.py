"""Several optimizers, seeds and amounts of label noise on one task, trained side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import numpy as np
import torch

from benchmarks.choice import Choice
from benchmarks.data import Pool, Split, make_split
from benchmarks.environment import describe
from benchmarks.registry import Task
from benchmarks.rows import Row
from benchmarks.summary import SHARED_SETTINGS
from benchmarks.training import Run

__all__ = ["Examine", "Experiment", "Watcher", "run_experiment"]

_CURVE_DIGITS = 6

Examine = Callable[[Run, Split], tuple[dict[str, float], dict[str, list[float]]]]
"""From a finished run and its data to metrics and curves that its row shall hold, too."""


@dataclass(frozen=True)
class Experiment:
    """What to train.

    Attributes:
        task: The task.
        choices: The optimizers.
        seeds: One run of every optimizer for each.
        label_noise: One run of every optimizer and seed for each.
        epochs: Passes over the training data.
        batch_size: Examples a step.
        train_size: Training examples; None for all.
        data: Where the task's data is; None for its default place.
        evaluate_on: "test" or "validation".
        sharpness_rho: Radius of the sharpness measure.
        device: Where to train.
        curves: Whether to measure after every epoch, or after the last one only.
    """

    task: Task
    choices: Sequence[Choice]
    seeds: Sequence[int]
    label_noise: Sequence[float]
    epochs: int
    batch_size: int
    train_size: int | None
    data: str | None
    evaluate_on: str
    sharpness_rho: float
    device: torch.device
    curves: bool = True

    def settings(self, choice: Choice) -> dict[str, float]:
        """Return what a row says about its settings.

        Args:
            choice: The optimizer.
        """
        return {**choice.settings, **{name: getattr(self, name) for name in SHARED_SETTINGS}}


class Watcher:
    """Told how an experiment proceeds; this one ignores it."""

    def group_begins(self, label_noise: float, seed: int) -> None:
        """One run of every optimizer begins, on the same data from the same weights."""

    def epoch_begins(self, optimizer: str, epoch: int) -> None:
        """An optimizer begins an epoch, counted from 0."""

    def epoch_ends(self) -> None:
        """That epoch is over."""

    def group_ends(self, rows: Sequence[Row]) -> None:
        """The group's runs are over."""


def run_experiment(
    experiment: Experiment, watcher: Watcher | None = None, *, examine: Examine | None = None
) -> Iterator[Row]:
    """Train everything, yielding each run when it is over.

    The optimizers of a group (one seed, one amount of label noise) take turns epoch by epoch, so that their times
    are measured under the same conditions even where the machine's speed changes.

    Args:
        experiment: What to train.
        watcher: Is told about progress.
        examine: Looks at every run when it is over.

    Raises:
        BenchmarkError: If something asked for is not possible.
    """
    watcher = watcher or Watcher()
    pool = experiment.task.load(experiment.data)
    environment = describe(experiment.device)
    for seed in experiment.seeds:
        for label_noise in experiment.label_noise:
            watcher.group_begins(label_noise, seed)
            split = _split(experiment, pool, label_noise, seed)
            runs = [_run(experiment, choice, split, seed) for choice in experiment.choices]
            _take_turns(runs, experiment, watcher)
            rows = [_row(experiment, run, split, label_noise, environment) for run in runs]
            watcher.group_ends(rows)
            if examine is not None:
                rows = [_examined(row, *examine(run, split)) for row, run in zip(rows, runs, strict=True)]
            yield from rows


def _split(experiment: Experiment, pool: Pool, label_noise: float, seed: int) -> Split:
    split = make_split(
        pool,
        seed,
        classes=experiment.task.classes,
        train_size=experiment.train_size,
        label_noise=label_noise,
        evaluate_on=experiment.evaluate_on,
    )
    device = experiment.device
    return replace(
        split,
        inputs=split.inputs.to(device),
        labels=split.labels.to(device),
        test_inputs=split.test_inputs.to(device),
        test_labels=split.test_labels.to(device),
    )


def _run(experiment: Experiment, choice: Choice, split: Split, seed: int) -> Run:
    return Run(
        experiment.task.build_model,
        choice,
        split,
        seed,
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        sharpness_rho=experiment.sharpness_rho,
        device=experiment.device,
    )


def _take_turns(runs: Sequence[Run], experiment: Experiment, watcher: Watcher) -> None:
    for epoch in range(experiment.epochs):
        first = epoch % len(runs)
        for run in (*runs[first:], *runs[:first]):
            watcher.epoch_begins(run.choice.label, epoch)
            run.train_epoch(measure=experiment.curves or epoch == experiment.epochs - 1)
            watcher.epoch_ends()


def _row(experiment: Experiment, run: Run, split: Split, label_noise: float, environment: dict[str, str | int]) -> Row:
    low, median, high = np.quantile(run.step_seconds, (0.2, 0.5, 0.8)).tolist()
    curves = {"accuracy": run.curves.accuracy, "train_loss": run.curves.train_loss, "sharpness": run.curves.sharpness}
    return Row(
        task=experiment.task.name,
        optimizer=run.choice.label,
        base=run.choice.case.base,
        seed=run.seed,
        label_noise=label_noise,
        evaluated_on=experiment.evaluate_on,
        settings=experiment.settings(run.choice),
        examples={"train": len(split.labels), "randomised": split.randomised, "test": len(split.test_labels)},
        metrics={name: curve[-1] for name, curve in curves.items()}
        | {"seconds_per_step": median, "seconds_per_step_q20": low, "seconds_per_step_q80": high},
        curves=_rounded(curves),
        warnings=run.warnings,
        environment=environment,
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _examined(row: Row, metrics: dict[str, float], curves: dict[str, list[float]]) -> Row:
    return replace(row, metrics=row.metrics | metrics, curves=row.curves | _rounded(curves))


def _rounded(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.{_CURVE_DIGITS}g}") for value in curve] for name, curve in curves.items()}
