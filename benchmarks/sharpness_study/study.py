"""Trains models as ``train`` does, and measures how sharp each ends."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import Split
from benchmarks.experiment import Experiment, run_experiment
from benchmarks.rows import Row
from benchmarks.run_log import RunLog
from benchmarks.sharpness_study.measures import measure_model
from benchmarks.summary import SHARED_SETTINGS
from benchmarks.table import labels_text
from benchmarks.training import Run

__all__ = ["BATCHES", "BATCH_SIZE", "run_study"]

BATCHES, BATCH_SIZE = 4, 64
"""Measured on: that many batches of that many training examples, with the labels that were trained on."""


def run_study(experiment: Experiment, path: Path, report: Callable[[str], None]) -> list[Row]:
    """Make every run of the experiment that the file does not have yet.

    Args:
        experiment: What to train.
        path: File of rows, to continue and to append to; it may hold other tasks.
        report: Called with a line of text as the runs of a seed end.

    Returns:
        Every row of the file.

    Raises:
        BenchmarkError: If the file holds something else, or runs that cannot be compared with these; or if something
            asked for is not possible.
    """
    log = RunLog(path)
    shared = tuple(getattr(experiment, name) for name in SHARED_SETTINGS)
    log.check(
        f"({', '.join(SHARED_SETTINGS)})",
        lambda row: tuple(row.settings[name] for name in SHARED_SETTINGS) if _is_of(row, experiment) else shared,
        lambda row: shared,
    )
    task = replace(experiment.task, load=functools.cache(experiment.task.load))
    for noise in experiment.label_noise:
        for seed in experiment.seeds:
            missing = [
                choice
                for choice in experiment.choices
                if log.find(task=task.name, label_noise=noise, seed=seed, optimizer=choice.label) is None
            ]
            if not missing:
                continue
            start = time.perf_counter()
            group = replace(experiment, task=task, choices=missing, seeds=[seed], label_noise=[noise], curves=False)
            for row in run_experiment(group, examine=_examine):
                log.add(row)
            names = ", ".join(choice.label for choice in missing)
            seconds = time.perf_counter() - start
            report(f"{task.name}, {labels_text(noise)}, seed {seed}: {names} ({seconds:.0f} s)")
    return log.rows


def _is_of(row: Row, experiment: Experiment) -> bool:
    return row.task == experiment.task.name


def _examine(run: Run, split: Split) -> tuple[dict[str, float], dict[str, list[float]]]:
    return measure_model(run.model, _batches(split))


def _batches(split: Split) -> list[tuple[Tensor, Tensor]]:
    chosen = slice(BATCHES * BATCH_SIZE)
    return list(zip(*(torch.split(tensor[chosen], BATCH_SIZE) for tensor in (split.inputs, split.labels)), strict=True))
