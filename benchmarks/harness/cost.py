"""What a method costs: its steps against the base's, taken in turns in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness.data import Split, make_split
from benchmarks.harness.environment import describe
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.tasks import TASKS, Task, folder_for
from benchmarks.harness.training import Experiment, Run
from benchmarks.harness.tuning import TUNING_SEED, name_of


@dataclass(frozen=True)
class Cost:
    """Processor time of one short run against the base's, so that other programs on the machine do not count.

    Attributes:
        task: The task's name.
        method: The method's name; "base" for the base.
        ratio: Its time divided by the base's, the median over the repetitions, times the multiple of its epochs.
        low: The 20% quantile.
        high: The 80% quantile.
        milliseconds: Of a step, mean over a run, the median over the repetitions.
        steps: Steps of each short run, in which a schedule of rho goes from its start to its end.
        repetitions: How many such runs of each method there were.
        environment: Commit, versions, device, threads.
    """

    task: str
    method: str
    ratio: float
    low: float
    high: float
    milliseconds: float
    steps: int
    repetitions: int
    environment: dict[str, str | int]


def measure(
    task_name: str, choices: Sequence[Choice], data: Path | None = None, *, steps: int, repetitions: int
) -> list[Cost]:
    """Return what each choice costs, in their order.

    Every repetition starts a short run of each and has them take one step in turns, so that all meet the same state of
    the machine; the first repetition, which warms up, is dropped.
    """
    task = TASKS[task_name]
    split = make_split(
        task.load(folder_for(task, data)), TUNING_SEED, classes=task.classes, train_size=steps * task.batch_size
    )
    seconds = np.array([_take_turns(task, choices, split, start) for start in range(repetitions + 1)])[1:]
    ratios = seconds / seconds[:, :1] * [choice.compute for choice in choices]
    costs = []
    for index, choice in enumerate(choices):
        low, middle, high = np.quantile(ratios[:, index], (0.2, 0.5, 0.8)).tolist()
        milliseconds = 1000 * float(np.median(seconds[:, index])) / steps
        name = "base" if index == 0 else name_of(choice.label)
        costs.append(Cost(task_name, name, middle, low, high, milliseconds, steps, repetitions, describe()))
    return costs


def _take_turns(task: Task, choices: Sequence[Choice], split: Split, start: int) -> list[float]:
    """Return the seconds of a short run of each choice; the ``start``-th, modulo their number, begins each round."""
    experiment = Experiment(task, choices, TUNING_SEED, 0.0, epochs=1, batch_size=task.batch_size)
    runs = [Run(experiment, choice, split, time.process_time) for choice in choices]
    first = start % len(runs)
    iterators = [run.steps() for run in (*runs[first:], *runs[:first])]
    for _ in range(len(split.labels) // task.batch_size):
        for iterator in iterators:
            next(iterator)
    return [sum(run.step_seconds) for run in runs]
