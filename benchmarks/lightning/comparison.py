"""The comparison: every method from every seed, at every amount of label noise; a row a run."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.data import Pool, make_split
from benchmarks.lightning.methods import METHODS, Method
from benchmarks.lightning.training import train
from benchmarks.registry import OPTIMIZERS, Task
from benchmarks.rows import Row
from benchmarks.run_log import RunLog
from benchmarks.table import labels_text

__all__ = ["Comparison", "Plan"]

_CPU = torch.device("cpu")
_PICTURED = "sgd+sam"


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        methods: Names in ``METHODS``.
        seeds: Each decides everything random of a run.
        label_noise: Fractions of the training labels to randomise.
        epochs: Passes over the training examples.
        train_size: Training examples.
        batch_size: Examples a step.
        test_size: Test examples; None for all there are.
    """

    methods: Sequence[str]
    seeds: Sequence[int]
    label_noise: Sequence[float]
    epochs: int
    train_size: int
    batch_size: int
    test_size: int | None = None


class Comparison:
    """Runs a plan; runs that the file has already are not repeated.

    Args:
        plan: What to run.
        task: The data and the network.
        pool: The task's data, read.
        folder: Where the rows are, as ``runs.jsonl``, to continue and to append to; and the monitor's picture of the
            first seed of SGD with SAM, ``monitor.png``.
        report: Called with a line of text as each run ends.

    Raises:
        BenchmarkError: If the file holds runs of another plan.
    """

    def __init__(self, plan: Plan, task: Task, pool: Pool, folder: Path, report: Callable[[str], None]) -> None:
        self._plan = plan
        self._task = task
        self._pool = pool
        self._folder = folder
        self._log = RunLog(folder / "runs.jsonl")
        self._report = report
        wanted = (plan.epochs, plan.batch_size, plan.train_size)
        self._log.check(
            "(epochs, batch size, training examples)",
            lambda row: (row.settings["epochs"], row.settings["batch_size"], row.examples["train"]),
            lambda row: wanted,
        )

    @property
    def rows(self) -> list[Row]:
        """Every row of the file."""
        return self._log.rows

    def run(self) -> None:
        """Make every run that the file lacks; the methods take turns, so that their times compare."""
        for label_noise in self._plan.label_noise:
            for seed in self._plan.seeds:
                for name in self._plan.methods:
                    if self._log.find(optimizer=name, seed=seed, label_noise=label_noise) is None:
                        self._run(METHODS[name], seed, label_noise)

    def _run(self, method: Method, seed: int, label_noise: float) -> None:
        plan = self._plan
        split = make_split(
            self._pool, seed, classes=self._task.classes, train_size=plan.train_size, label_noise=label_noise
        )
        settings = dict(OPTIMIZERS[method.base].defaults)
        pictured = method.name == _PICTURED and seed == plan.seeds[0] and label_noise == plan.label_noise[-1]
        outcome = train(
            method,
            split,
            self._task.build_model,
            settings,
            seed,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            test_size=plan.test_size,
            plot=self._folder / "monitor.png" if pictured else None,
        )
        last = {name: curve[-1] for name, curve in outcome.curves.items()}
        self._log.add(
            Row(
                task="lightning",
                optimizer=method.name,
                base=method.base,
                seed=seed,
                label_noise=label_noise,
                evaluated_on="test",
                settings=settings | dict(method.options) | {"epochs": plan.epochs, "batch_size": plan.batch_size},
                examples={"train": plan.train_size, "randomised": split.randomised, "test": outcome.tested},
                metrics=last | {"seconds_per_step": outcome.seconds_per_step, "monitor_share": outcome.monitor_share},
                curves=outcome.curves,
                warnings=outcome.warnings,
                environment=environment.describe(_CPU),
                timestamp=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            )
        )
        self._report(
            f"{labels_text(label_noise)}, seed {seed}: {method.name}: accuracy {100 * last['accuracy']:.1f}%, "
            f"worst-case sharpness {last['worst_case']:.3f}, {1000 * outcome.seconds_per_step:.1f} ms a step"
        )
