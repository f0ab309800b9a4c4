"""What a method costs: its steps against the base's, taken in turns in one process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.choice import Choice
from benchmarks.data import Split, make_split
from benchmarks.environment import describe
from benchmarks.frontier.methods import BASE, name_of
from benchmarks.json_lines import as_lines, read_lines
from benchmarks.registry import TASKS
from benchmarks.run_log import TUNING_SEED
from benchmarks.training import Run

__all__ = ["Cost", "measure", "read_costs", "write_costs"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cost:
    """Processor time of one short run against the base's, so that other programs on the machine do not count.

    Attributes:
        task: The task's name.
        method: The method's name; "base" for the base.
        ratio: Its time divided by the base's, the median over the repetitions.
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
    environment: Mapping[str, str | int]


def measure(task_name: str, choices: Sequence[Choice], *, steps: int, repetitions: int) -> list[Cost]:
    """Return what each choice costs, in their order.

    Every repetition starts a short run of each and has them take one step in turns, so that all meet the same state of
    the machine; the first repetition, which warms up, is dropped.

    Args:
        task_name: The task.
        choices: The optimizers; the task's base is among them.
        steps: Steps of each run, > 0.
        repetitions: How many repetitions count, > 0.
    """
    task = TASKS[task_name]
    size = steps * task.batch_size
    split = make_split(task.load(None), TUNING_SEED, classes=task.classes, train_size=size)
    seconds = np.array(
        [_take_turns(task_name, choices, split, start) for start in range(repetitions + 1)]
    )[1:]  # fmt: skip
    base = next(index for index, choice in enumerate(choices) if choice.case.name == choice.case.base)
    ratios = seconds / seconds[:, [base]]
    environment = describe(_CPU)
    costs = []
    for index, choice in enumerate(choices):
        low, middle, high = np.quantile(ratios[:, index], (0.2, 0.5, 0.8)).tolist()
        milliseconds = 1000 * float(np.median(seconds[:, index])) / steps
        name = BASE.name if index == base else name_of(choice.label)
        costs.append(Cost(task_name, name, middle, low, high, milliseconds, steps, repetitions, environment))
    return costs


def write_costs(path: Path, costs: Sequence[Cost]) -> None:
    """Write costs, a JSON object a line.

    Args:
        path: The file, replaced.
        costs: What to write.
    """
    path.write_text(as_lines(costs), encoding="utf-8")


def read_costs(path: Path) -> list[Cost]:
    """Return what ``write_costs`` wrote; nothing where there is no file.

    Args:
        path: The file.

    Raises:
        BenchmarkError: If it holds something else.
    """
    return read_lines(path, Cost, "costs", "remove it to measure them again")


def _take_turns(task_name: str, choices: Sequence[Choice], split: Split, start: int) -> list[float]:
    task = TASKS[task_name]
    runs = [
        Run(
            task.build_model,
            choice,
            split,
            TUNING_SEED,
            epochs=1,
            batch_size=task.batch_size,
            sharpness_rho=0.0,
            device=_CPU,
            clock=time.process_time,
        )
        for choice in choices
    ]
    first = start % len(runs)
    iterators = [run.steps() for run in (*runs[first:], *runs[:first])]
    for _ in range(len(split.labels) // task.batch_size):
        for iterator in iterators:
            next(iterator)
    return [sum(run.step_seconds) for run in runs]
