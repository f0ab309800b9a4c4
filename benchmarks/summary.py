"""From rows to one line for each optimizer: mean and spread over the seeds, cost and gain relative to its base."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.errors import BenchmarkError
from benchmarks.rows import Row

__all__ = ["SHARED_SETTINGS", "Estimate", "Panel", "Summary", "estimate", "panels", "summarise"]

SHARED_SETTINGS = ("epochs", "batch_size", "sharpness_rho")
"""What every run of a panel has in common, whatever its optimizer."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        sd: The sample standard deviation; nan for a single seed.
        n: The number of seeds.
    """

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Panel:
    """The rows that may be compared with each other.

    Attributes:
        task: Their task.
        evaluated_on: "test" or "validation".
        label_noise: Their amount of label noise.
        runs: For every optimizer its rows, by seed.
    """

    task: str
    evaluated_on: str
    label_noise: float
    runs: dict[str, list[Row]]


@dataclass(frozen=True)
class Summary:
    """One optimizer in one panel.

    Attributes:
        optimizer: Its name.
        accuracy: Fraction of the test examples classified rightly.
        gain: Its accuracy minus its base's for the same seed; None where that base was not run, or it is a base.
        train_loss: Mean over the last epoch's steps.
        seconds_per_step: Median of a run's steps.
        cost: That divided by its base's for the same seed; None where that base was not run.
        sharpness: See ``one_step_sharpness``.
    """

    optimizer: str
    accuracy: Estimate
    gain: Estimate | None
    train_loss: Estimate
    seconds_per_step: Estimate
    cost: Estimate | None
    sharpness: Estimate


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, sample standard deviation and number of the values.

    Args:
        values: At least one; a nan among them makes the result nan.
    """
    if not all(map(math.isfinite, values)):
        return Estimate(math.nan, math.nan, len(values))
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), sd, len(values))


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Return the rows in panels, in the order in which they first appear, least noise first for each task.

    Args:
        rows: Any rows.

    Raises:
        BenchmarkError: If they are not comparable: other data or settings, or a seed twice.
    """
    found: dict[tuple[str, str, float], Panel] = {}
    for row in rows:
        key = (row.task, row.evaluated_on, row.label_noise)
        panel = found.setdefault(key, Panel(*key, runs={}))
        panel.runs.setdefault(row.optimizer, []).append(row)
    for panel in found.values():
        for runs in panel.runs.values():
            runs.sort(key=lambda row: row.seed)
            _check_averageable(runs)
        _check_comparable(panel)
    tasks = list(dict.fromkeys((panel.task, panel.evaluated_on) for panel in found.values()))
    return sorted(found.values(), key=lambda p: (tasks.index((p.task, p.evaluated_on)), p.label_noise))


def summarise(panel: Panel) -> list[Summary]:
    """Return a summary for each of a panel's optimizers, in the order in which they were run.

    Args:
        panel: What ``panels`` returned.
    """
    return [_summarise(runs, _base_runs(runs[0], panel)) for runs in panel.runs.values()]


def _base_runs(row: Row, panel: Panel) -> list[Row]:
    """Return the runs of the base that a row's optimizer wraps: that optimizer with the very settings it has there."""
    for runs in panel.runs.values():
        if _case(runs[0]) == row.base and runs[0].settings.items() <= row.settings.items():
            return runs
    return []


def _case(row: Row) -> str:
    return row.optimizer.partition(":")[0]


def _summarise(runs: list[Row], base_runs: list[Row]) -> Summary:
    bases = {row.seed: row for row in base_runs}
    pairs = [(row, bases[row.seed]) for row in runs if row.seed in bases]
    is_base = _case(runs[0]) == runs[0].base
    return Summary(
        optimizer=runs[0].optimizer,
        accuracy=_over(runs, "accuracy"),
        gain=None if is_base else _paired(pairs, "accuracy", lambda value, base: value - base),
        train_loss=_over(runs, "train_loss"),
        seconds_per_step=_over(runs, "seconds_per_step"),
        cost=_paired(pairs, "seconds_per_step", lambda value, base: value / base),
        sharpness=_over(runs, "sharpness"),
    )


def _over(runs: list[Row], metric: str) -> Estimate:
    return estimate([row.metrics[metric] for row in runs])


def _paired(pairs: list[tuple[Row, Row]], metric: str, compare: Callable[[float, float], float]) -> Estimate | None:
    return estimate([compare(row.metrics[metric], base.metrics[metric]) for row, base in pairs]) if pairs else None


def _check_comparable(panel: Panel) -> None:
    """Raise unless every run of the panel had the same data and training settings."""
    rows = [row for runs in panel.runs.values() for row in runs]
    shared = [{name: row.settings[name] for name in SHARED_SETTINGS} | row.examples for row in rows]
    for row, values in zip(rows, shared, strict=True):
        differing = _differing(shared[0], values)
        if differing:
            raise BenchmarkError(
                f"{rows[0].optimizer} and {row.optimizer} on {panel.task} with label noise {panel.label_noise:g} "
                f"cannot be compared: they differ in {differing}; report them one by one"
            )


def _check_averageable(runs: list[Row]) -> None:
    """Raise unless the runs of one optimizer differ in their seeds, and only there."""
    first = runs[0]
    where = f"{first.optimizer} on {first.task} with label noise {first.label_noise:g}"
    for row in runs:
        differing = _differing(first.settings, row.settings)
        if differing:
            raise BenchmarkError(
                f"the runs of {where} cannot be averaged: they differ in {differing}; report them one by one"
            )
    seeds = [row.seed for row in runs]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise BenchmarkError(
            f"seed {twice} is there {seeds.count(twice)} times among the runs of {where}, which would hide the spread; "
            "remove the repetitions"
        )


def _differing(first: Mapping[str, float], second: Mapping[str, float]) -> str:
    return ", ".join(sorted({name for name, _ in first.items() ^ second.items()}))
