"""From rows to numbers: means over seeds, gains paired by seed, 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.rows import Row
from benchmarks.harness.training import SHARED_SETTINGS

_CONFIDENCE = 0.95
_RESAMPLES = 1000
_FEW_PAIRS = 20


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean over the seeds.
        sd: The sample standard deviation; nan for a single seed.
        n: The number of seeds.
    """

    mean: float
    sd: float
    n: int

    def half_width(self, picked_from: int = 1) -> float:
        """Return half the width of the mean's 95 % confidence interval by Student's t; nan for a single seed."""
        if self.n < 2:
            return math.nan
        tail = (1 - _CONFIDENCE) / 2 / picked_from
        return float(stats.t.isf(tail, self.n - 1)) * self.sd / math.sqrt(self.n)

    def spread(self, style: str = ".1f", factor: float = 1.0) -> str:
        """Return "mean ± standard deviation", the mean alone for a single seed."""
        mean = format(factor * self.mean, style)
        return mean if math.isnan(self.sd) else f"{mean} ± {format(factor * self.sd, style.removeprefix('+'))}"

    def interval(self, style: str = "+.1f", factor: float = 100.0, picked_from: int = 1) -> str:
        """Return "mean [low, high]" with the bounds of ``half_width``."""
        margin = self.half_width(picked_from)
        if math.isnan(margin):
            return f"{format(factor * self.mean, style)} (one seed)"
        low, high = (format(factor * bound, style) for bound in (self.mean - margin, self.mean + margin))
        return f"{format(factor * self.mean, style)} [{low}, {high}]"


@dataclass(frozen=True)
class Agreement:
    """How well one quantity orders things by another.

    Attributes:
        tau: Kendall's tau-b: 1 for the same order, -1 for the reverse; nan where there is nothing to order.
        low: Lower bound of its 95 % bootstrap interval.
        high: Upper bound of the same interval.
        pairs: Number of pairs that are compared.
    """

    tau: float
    low: float
    high: float
    pairs: int

    def text(self) -> str:
        """Return "tau [low, high]"; with fewer than 20 pairs only tau; nothing where there is nothing to order."""
        if math.isnan(self.tau):
            return ""
        if self.pairs < _FEW_PAIRS:  # the bootstrap could give an interval of no width
            return f"{self.tau:+.2f} ({self.pairs} pairs)"
        return f"{self.tau:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Panel:
    """The rows that may be compared with each other.

    Attributes:
        task: Name of the task that they were trained on.
        evaluated_on: "test" or "validation".
        label_noise: Their amount of label noise.
        runs: For every optimizer its rows, by seed.
    """

    task: str
    evaluated_on: str
    label_noise: float
    runs: dict[str, list[Row]]

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for runs in self.runs.values() for row in runs]


def estimate(values: Iterable[float]) -> Estimate:
    """Return mean, sample standard deviation and number of the values; a nan among them makes the result nan."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return Estimate(math.nan, math.nan, len(values))
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), sd, len(values))


def over(runs: Sequence[Row], metric: str) -> Estimate:
    """Return a metric's estimate over rows."""
    return estimate(row.metrics[metric] for row in runs)


def pairs(runs: Sequence[Row], bases: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the rows with the base's of the same seed, where there is one."""
    by_seed = {row.seed: row for row in bases}
    return [(row, by_seed[row.seed]) for row in runs if row.seed in by_seed]


def gain(
    runs: Sequence[Row],
    bases: Sequence[Row],
    metric: str = "accuracy",
    compare: Callable[[float, float], float] = lambda value, base: value - base,
) -> Estimate | None:
    """Return a metric against the base's with the same seed, as a difference; None where no seed is shared."""
    paired = pairs(runs, bases)
    return estimate(compare(row.metrics[metric], base.metrics[metric]) for row, base in paired) if paired else None


def rank_agreement(
    first: Sequence[float], second: Sequence[float], groups: Sequence[object] | None = None
) -> Agreement:
    """Return Kendall's tau-b of two quantities with a 95 % percentile bootstrap interval.

    With groups, only pairs of one group count, and things are resampled within their groups.

    Args:
        first: A quantity of each thing; inf is the largest.
        second: Another quantity of each thing, in the same order.
        groups: The group of each thing; None for one group.
    """
    ranks = [stats.rankdata(values) for values in (first, second)]
    signs = [np.sign(np.subtract.outer(values, values)) for values in ranks]
    names = list(groups or [0] * len(first))
    members = [np.array([name == each for each in names]) for name in dict.fromkeys(names)]
    same = sum(np.outer(each, each) for each in members)
    count = sum(int(each.sum()) * (int(each.sum()) - 1) // 2 for each in members)
    pairs_of = [same * sign for sign in (signs[0] * signs[1], signs[0] ** 2, signs[1] ** 2)]
    random = np.random.default_rng(0)
    counts = np.zeros((_RESAMPLES + 1, len(names)))  # how often each thing is drawn: once in the first line
    for each in members:
        n = int(each.sum())
        counts[:, each] = np.vstack([np.ones(n), random.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)])
    concordant, ordered, others = (((counts @ pair) * counts).sum(axis=1) for pair in pairs_of)
    with np.errstate(invalid="ignore"):
        taus = concordant / np.sqrt(ordered * others)
    if not np.isfinite(taus[0]):
        return Agreement(math.nan, math.nan, math.nan, count)
    low, high = np.nanquantile(taus[1:], ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2))
    return Agreement(float(taus[0]), float(low), float(high), count)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Return the rows in panels, in the order in which they first appear, least noise first for each task."""
    found: dict[tuple[str, str, float], Panel] = {}
    for row in rows:
        key = (row.task, row.evaluated_on, row.label_noise)
        panel = found.setdefault(key, Panel(*key, runs={}))
        panel.runs.setdefault(row.optimizer, []).append(row)
    for panel in found.values():
        where = f"on {panel.task} with label noise {panel.label_noise:g}"
        for name, runs in panel.runs.items():
            runs.sort(key=lambda row: row.seed)
            _check_alike(runs, [row.settings for row in runs], f"the runs of {name} {where} cannot be averaged")
            seeds = [row.seed for row in runs]
            for seed in set(seeds):
                if seeds.count(seed) > 1:
                    raise BenchmarkError(
                        f"seed {seed} is there {seeds.count(seed)} times among the runs of {name} {where}"
                    )
        shared = [{name: row.settings.get(name) for name in SHARED_SETTINGS} | row.examples for row in panel.rows]
        _check_alike(panel.rows, shared, f"the runs {where} cannot be compared")
    tasks = list(dict.fromkeys((panel.task, panel.evaluated_on) for panel in found.values()))
    return sorted(found.values(), key=lambda p: (tasks.index((p.task, p.evaluated_on)), p.label_noise))


def base_runs(name: str, panel: Panel) -> list[Row]:
    """Return the runs of the base that an optimizer wraps, with the settings that the base has there; [] for none."""
    row = panel.runs[name][0]
    for runs in panel.runs.values():
        if runs[0].optimizer.partition(":")[0] == row.base and runs[0].settings.items() <= row.settings.items():
            return runs
    return []


def _check_alike(rows: Sequence[Row], values: Sequence[Mapping[str, object]], problem: str) -> None:
    for row, each in zip(rows, values, strict=True):
        if differing := sorted({name for name, _ in values[0].items() ^ each.items()}):
            raise BenchmarkError(
                f"{problem}: {rows[0].optimizer} (seed {rows[0].seed}) and {row.optimizer} (seed {row.seed}) differ in "
                f"{', '.join(differing)}; report them one by one"
            )
