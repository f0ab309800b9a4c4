"""The comparison: settings chosen on validation data, then every method from every seed on the test set."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.choice import Choice
from benchmarks.experiment import Experiment, run_experiment
from benchmarks.frontier.arenas import Arena
from benchmarks.frontier.methods import BASE, METHODS, Method
from benchmarks.registry import TASKS, Task
from benchmarks.rows import Row
from benchmarks.run_log import TUNING_SEED, RunLog, best_setting
from benchmarks.table import labels_text

__all__ = ["SHARPNESS_RHO", "Comparison", "Plan"]

SHARPNESS_RHO = 0.05


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        arenas: The tasks.
        methods: Names in ``METHODS``; the base is among them.
        seeds: Of the final runs; the runs that choose settings have one of their own.
        label_noise: Fractions of the training labels to randomise.
        tune: Whether to choose settings; without, the middle value of each is taken.
    """

    arenas: Sequence[Arena]
    methods: Sequence[str]
    seeds: Sequence[int]
    label_noise: Sequence[float]
    tune: bool

    def methods_of(self, arena: Arena) -> list[Method]:
        """Return the methods that can be used with an arena's base.

        Args:
            arena: Where.
        """
        return [METHODS[name] for name in self.methods if arena.base in METHODS[name].bases]

    def count(self) -> int:
        """Return the number of runs."""
        runs = sum(
            (len(method.values_in(arena)) if self.tune else 0) + len(self.seeds)
            for arena in self.arenas
            for method in self.methods_of(arena)
        )
        return runs * len(self.label_noise)


class Comparison:
    """Runs a plan, a row a run; runs that the file has already are not repeated.

    Args:
        plan: What to run.
        path: File of rows, to continue and to append to.
        report: Called with a line of text as each run ends.

    Raises:
        BenchmarkError: If the file holds something else, or runs of another size.
    """

    def __init__(self, plan: Plan, path: Path, report: Callable[[str], None]) -> None:
        self._plan = plan
        self._log = RunLog(path)
        self._report = report
        self._done = 0
        sizes = {arena.task: (arena.epochs, arena.train_size) for arena in plan.arenas}
        self._log.check(
            "(epochs, training examples)",
            lambda row: _size(row, sizes),
            lambda row: sizes.get(row.task, _size(row, sizes)),
        )

    @property
    def rows(self) -> list[Row]:
        """Every row of the file."""
        return self._log.rows

    def run(self) -> dict[str, list[Choice]]:
        """Choose settings, then run every method from every seed.

        Returns:
            For each task what was chosen with the first amount of label noise, to measure the cost of.

        Raises:
            BenchmarkError: If a task's data is missing.
        """
        places = [(arena, noise) for arena in self._plan.arenas for noise in self._plan.label_noise]
        chosen = {(arena.task, noise): self._choose_all(arena, noise) for arena, noise in places}
        for seed in self._plan.seeds:
            for arena, noise in places:
                for choice in chosen[arena.task, noise]:
                    self._row(arena, choice, noise, seed, "test")
        return {arena.task: chosen[arena.task, self._plan.label_noise[0]] for arena in self._plan.arenas}

    def _choose_all(self, arena: Arena, noise: float) -> list[Choice]:
        lr = self._choose(arena, noise, BASE.values_in(arena), lambda value: BASE.choice(arena, value, value))
        choices = []
        for method in self._plan.methods_of(arena):
            make = functools.partial(method.choice, arena, lr)
            value = lr if method is BASE else self._choose(arena, noise, method.values_in(arena), make)
            choices.append(make(value))
        return choices

    def _choose(self, arena: Arena, noise: float, values: Sequence[float], make: Callable[[float], Choice]) -> float:
        def validated(value: float) -> Row:
            return self._row(arena, make(value), noise, TUNING_SEED, "validation")

        return best_setting(values, validated if self._plan.tune else None)

    def _row(self, arena: Arena, choice: Choice, noise: float, seed: int, evaluate_on: str) -> Row:
        experiment = Experiment(
            task=_task(arena.task),
            choices=[choice],
            seeds=[seed],
            label_noise=[noise],
            epochs=arena.epochs,
            batch_size=TASKS[arena.task].batch_size,
            train_size=arena.train_size,
            data=None,
            evaluate_on=evaluate_on,
            sharpness_rho=SHARPNESS_RHO,
            device=torch.device("cpu"),
            curves=False,
        )
        found = self._log.find(
            task=arena.task,
            optimizer=choice.label,
            seed=seed,
            label_noise=noise,
            evaluated_on=evaluate_on,
            settings=experiment.settings(choice),
        )
        self._done += 1
        if found is not None:
            return found
        start = time.perf_counter()
        (row,) = run_experiment(experiment)
        self._log.add(row)
        self._report(
            f"[{self._done}/{self._plan.count()}] {arena.task}, {labels_text(noise)}, {evaluate_on}, seed {seed}: "
            f"{choice.label}: {100 * row.metrics['accuracy']:.1f}% ({time.perf_counter() - start:.1f} s)"
        )
        return row


@functools.cache
def _task(name: str) -> Task:
    """Return a task that reads its data once."""
    task = TASKS[name]
    return replace(task, load=functools.cache(task.load))


def _size(row: Row, sizes: dict[str, tuple[int, int | None]]) -> tuple[float, int | None]:
    every = sizes.get(row.task, (0, None))[1] is None
    return row.settings["epochs"], None if every else row.examples["train"]
