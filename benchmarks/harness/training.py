"""Runs of image classifiers: several optimizers from the same weights on the same batches, in turns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.data import EvaluationSet, Split, make_split, stream, stream_seed
from benchmarks.harness.environment import CPU, describe, now
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.loop import take_step
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.rows import Row
from benchmarks.harness.tasks import Task
from samopt import sharpness

SHARED_SETTINGS = ("epochs", "batch_size", "sharpness_rho")
"""What every run that is compared has in common, with any optimizer."""

_SHARPNESS_BATCHES = 4
_EVALUATION_BATCH = 1000
_CURVE_DIGITS = 6


@dataclass(frozen=True)
class Experiment:
    """What to train.

    Attributes:
        task: Data and network to train on.
        choices: The optimizers to compare, with their settings.
        seed: Of every run.
        label_noise: Fraction of the training labels to randomise.
        epochs: Passes over the training data.
        batch_size: Examples a step.
        train_size: Training examples; None for all.
        data: Folder of the task's data; None for its default place.
        evaluate_on: "test" or "validation".
        sharpness_rho: Radius of the sharpness measure.
        device: Where to train.
        curves: Whether to measure after every epoch, or after the last one only.
    """

    task: Task
    choices: Sequence[Choice]
    seed: int
    label_noise: float
    epochs: int
    batch_size: int
    train_size: int | None = None
    data: Path | None = None
    evaluate_on: EvaluationSet = "test"
    sharpness_rho: float = 0.05
    device: torch.device = CPU
    curves: bool = True

    def settings(self, choice: Choice) -> dict[str, Any]:
        """Return what a row of that choice says about its settings."""
        return {**choice.settings, **{name: getattr(self, name) for name in SHARED_SETTINGS}}

    def split(self) -> Split:
        """Return the data of the runs."""
        pool = self.task.load(self.data)
        return make_split(
            pool,
            self.seed,
            classes=self.task.classes,
            train_size=self.train_size,
            label_noise=self.label_noise,
            evaluate_on=self.evaluate_on,
        ).to(self.device)


class Run:
    """A model in training.

    Two runs of an experiment start from the same weights and see the same batches in the same order, no matter what
    their optimizers draw: each epoch starts from its own random state, and the caller's is left alone.

    Args:
        experiment: Task, seed, epochs and the rest.
        choice: The optimizer, its settings and schedules.
        split: The data; an incomplete last batch of an epoch is left out.
        clock: What steps are timed by.

    Raises:
        BenchmarkError: If a setting is out of range, or there is not one whole batch.

    Attributes:
        curves: Measured after each epoch: "accuracy"; "train_loss", the mean over the epoch's steps of the loss before
            the step; "sharpness", see ``one_step_sharpness``.
        step_seconds: How long each step took.
        warnings: Texts of the warnings given so far.
    """

    def __init__(
        self, experiment: Experiment, choice: Choice, split: Split, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._batch_size = batch_size = experiment.batch_size
        if not 1 <= batch_size <= len(split.labels):
            raise BenchmarkError(
                f"--batch-size must be between 1 and the {len(split.labels)} training examples, got {batch_size}; "
                "choose a smaller one"
            )
        self.choice, self.seed = choice, experiment.seed
        self.curves: dict[str, list[float]] = {"accuracy": [], "train_loss": [], "sharpness": []}
        self.step_seconds: list[float] = []
        self.warnings: list[str] = []
        self._split, self._device, self._clock = split, experiment.device, clock
        self._sharpness_rho = experiment.sharpness_rho
        self._steps_per_epoch = len(split.labels) // batch_size
        self._epoch = 0
        self.model = build_model(experiment.task.build_model, self.seed).to(self._device)
        self.optimizer = choice.build(self.model)
        self._schedulers = choice.schedulers(self.optimizer, experiment.epochs * self._steps_per_epoch)

    def train_epoch(self, *, measure: bool = True) -> None:
        """Train for one epoch, then measure accuracy and sharpness if asked to, which leave the training as it is."""
        devices = [] if self._device.type == "cpu" else [self._device]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            with torch.random.fork_rng(devices, device_type=self._device.type if devices else "cuda"):
                torch.manual_seed(stream_seed(self.seed, f"epoch {self._epoch}"))
                losses = list(self.steps())
                self.curves["train_loss"].append(float(torch.stack(losses).double().mean()))
                if measure:
                    self.curves["accuracy"].append(self._accuracy())
                    batches = self._sharpness_batches()
                    self.curves["sharpness"].append(one_step_sharpness(self.model, batches, self._sharpness_rho))
        self.warnings += [text for warning in caught if (text := str(warning.message)) not in self.warnings]

    def steps(self) -> Iterator[Tensor]:
        """Take the steps of an epoch, one whenever the iterator is asked for the next loss."""
        self.model.train()
        order = epoch_order(len(self._split.labels), self.seed, self._epoch).to(self._device)
        self._epoch += 1
        for step in range(self._steps_per_epoch):
            batch = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield self._step(self._split.inputs[batch], self._split.labels[batch])
            for scheduler in self._schedulers:
                scheduler.step()

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        ascent = None
        if "ascent_part" in self.choice.schedule:
            part = max(1, round(self.choice.schedule["ascent_part"] * len(labels)))
            ascent = partial(self._loss, inputs[:part], labels[:part])
        _wait_for(self._device)
        start = self._clock()
        loss = take_step(self.optimizer, partial(self._loss, inputs, labels), ascent)
        _wait_for(self._device)
        self.step_seconds.append(self._clock() - start)
        return loss

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(inputs), labels)

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        inputs, labels = self._split.test_inputs, self._split.test_labels
        predictions = torch.cat([self.model(part).argmax(dim=1) for part in torch.split(inputs, _EVALUATION_BATCH)])
        return int((predictions == labels).sum()) / len(labels)

    def _sharpness_batches(self) -> list[tuple[Tensor, Tensor]]:
        count = min(_SHARPNESS_BATCHES, self._steps_per_epoch) * self._batch_size
        chosen = torch.randperm(len(self._split.labels), generator=stream(self.seed, "sharpness"))[:count]
        return [(self._split.inputs[part], self._split.labels[part]) for part in torch.split(chosen, self._batch_size)]


def run_experiment(experiment: Experiment, clock: Callable[[], float] = time.perf_counter) -> Iterator[tuple[Row, Run]]:
    """Train every choice, and yield each with its row; the clock times the steps.

    They take turns epoch by epoch, so that their times are measured under the same conditions even where the machine's
    speed changes.
    """
    split = experiment.split()
    runs = [Run(experiment, choice, split, clock) for choice in experiment.choices]
    for epoch in range(experiment.epochs):
        first = epoch % len(runs)
        for run in (*runs[first:], *runs[:first]):
            run.train_epoch(measure=experiment.curves or epoch == experiment.epochs - 1)
    for run in runs:
        low, median, high = np.quantile(run.step_seconds, (0.2, 0.5, 0.8)).tolist()
        times = {"seconds_per_step": median, "seconds_per_step_q20": low, "seconds_per_step_q80": high}
        row = Row(
            task=experiment.task.name,
            optimizer=run.choice.label,
            base=run.choice.base,
            seed=run.seed,
            label_noise=experiment.label_noise,
            evaluated_on=experiment.evaluate_on,
            settings=experiment.settings(run.choice),
            examples={"train": len(split.labels), "randomised": split.randomised, "test": len(split.test_labels)},
            metrics={name: curve[-1] for name, curve in run.curves.items()} | times,
            curves=rounded(run.curves),
            warnings=run.warnings,
            environment=describe(experiment.device),
            timestamp=now(),
        )
        yield row, run


def with_measures(row: Row, metrics: dict[str, float], curves: dict[str, list[float]]) -> Row:
    """Return a row with more metrics and curves."""
    return replace(row, metrics=row.metrics | metrics, curves=row.curves | rounded(curves))


def build_model(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a model whose initial weights depend on the seed alone; torch's random stream is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "model"))
        return make_model()


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits the training examples, shape ``(count,)``."""
    return torch.randperm(count, generator=stream(seed, f"order of epoch {epoch}"))


def one_step_sharpness(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], rho: float) -> float:
    """Return the mean over batches of ``L(w + rho g / ||g||_2) - L(w)``: how much one ascent step raises the loss.

    ``L`` is the batch's cross-entropy in evaluation mode and g its gradient; a batch whose loss falls counts 0. The
    same measure for every optimizer; the model comes back bit for bit. Nan where the loss is not finite.
    """
    try:
        return sharpness.worst_case(model, sharpness.cross_entropy, batches, rho=rho, steps=1, progress=False).value
    except ValueError:
        return float("nan")


def rounded(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return curves with six significant digits."""
    return {name: [float(f"{value:.{_CURVE_DIGITS}g}") for value in curve] for name, curve in curves.items()}


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
