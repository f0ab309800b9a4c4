"""Which method to use at which cost, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats  # type: ignore[import-untyped]

from benchmarks.frontier.cost import Cost
from benchmarks.frontier.methods import BASE, METHODS, name_of
from benchmarks.rows import Row
from benchmarks.summary import Estimate, estimate

__all__ = ["BUDGETS", "SLACK", "Advice", "Outcome", "Place", "advise", "gain", "half_width", "overall", "places"]

BUDGETS = (1.0, 1.25, 1.5, 2.0)
SLACK = 0.05
"""How far over its budget a method may be, as a fraction: timings are no better than that."""

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """A method in one place.

    Attributes:
        method: Its name; "base" for the base.
        label: With the setting that was chosen, as in "sam:rho=0.1".
        cost: What it costs.
        accuracies: For each seed, the fraction of the test examples classified rightly.
    """

    method: str
    label: str
    cost: float
    accuracies: Mapping[int, float]

    @property
    def accuracy(self) -> Estimate:
        """Over the seeds."""
        return estimate(list(self.accuracies.values()))


@dataclass(frozen=True)
class Place:
    """One task with one amount of label noise.

    Attributes:
        task: The task's name.
        label_noise: Fraction of the training labels that were randomised; None for a mean over places.
        outcomes: Of every method, the base first.
    """

    task: str
    label_noise: float | None
    outcomes: Sequence[Outcome]

    @property
    def base(self) -> Outcome:
        """The base's outcome."""
        return self.outcomes[0]


@dataclass(frozen=True)
class Advice:
    """What to use for a budget.

    Attributes:
        budget: Training cost as a multiple of the base's.
        best: The affordable method with the best mean accuracy that is not the base; None where none is affordable.
        gain: Its accuracy minus the base's with the same seed; None where none is affordable.
        margin: Half the width of the gain's confidence interval, widened for the number of methods it was picked from.
    """

    budget: float
    best: Outcome | None
    gain: Estimate | None
    margin: float

    @property
    def is_better(self) -> bool:
        """Whether the whole interval is above the base."""
        return self.gain is not None and self.gain.mean - self.margin > 0


def places(rows: Sequence[Row], costs: Sequence[Cost]) -> list[Place]:
    """Return what was measured on test data, by task and label noise; methods of unknown cost are left out.

    Args:
        rows: Any rows of the comparison.
        costs: What the methods cost.
    """
    ratios = {(cost.task, cost.method): cost.ratio for cost in costs}
    found: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for row in rows:
        if row.evaluated_on == "test":
            name = BASE.name if name_of(row.optimizer) == row.base else name_of(row.optimizer)
            if (row.task, name) in ratios:
                found.setdefault((row.task, row.label_noise), {}).setdefault(name, []).append(row)
    return [
        Place(
            task,
            noise,
            [
                Outcome(
                    name,
                    methods[name][0].optimizer,
                    ratios[task, name],
                    {row.seed: row.metrics["accuracy"] for row in methods[name]},
                )
                for name in METHODS
                if name in methods
            ],
        )
        for (task, noise), methods in found.items()
        if BASE.name in methods
    ]


def overall(found: Sequence[Place]) -> Place:
    """Return the mean over places, seed by seed, of the methods that every place has.

    Args:
        found: At least one place.
    """
    by_method = [{outcome.method: outcome for outcome in place.outcomes} for place in found]
    outcomes = []
    for method in by_method[0]:
        present = [methods[method] for methods in by_method if method in methods]
        seeds = [seed for seed in present[0].accuracies if all(seed in outcome.accuracies for outcome in present)]
        if len(present) == len(found) and seeds:
            mean = {seed: math.fsum(o.accuracies[seed] for o in present) / len(present) for seed in seeds}
            cost = math.fsum(outcome.cost for outcome in present) / len(present)
            outcomes.append(Outcome(method, method, cost, mean))
    return Place("mean over all", None, outcomes)


def gain(outcome: Outcome, base: Outcome) -> Estimate:
    """Return a method's accuracy minus the base's, over the seeds that both have.

    Args:
        outcome: The method's.
        base: The base's, with a seed in common.
    """
    return estimate([value - base.accuracies[s] for s, value in outcome.accuracies.items() if s in base.accuracies])


def half_width(value: Estimate, picked_from: int = 1) -> float:
    """Return half the width of a mean's 95% confidence interval by Student's t; nan for a single seed.

    Args:
        value: The mean.
        picked_from: Among how many it was the best: Bonferroni's correction widens the interval for that.
    """
    if value.n < 2:
        return math.nan
    tail = (1 - _CONFIDENCE) / 2 / picked_from
    return float(stats.t.isf(tail, value.n - 1)) * value.sd / math.sqrt(value.n)


def advise(place: Place, budget: float) -> Advice:
    """Return which method to use for a budget.

    Args:
        place: Where.
        budget: Training cost as a multiple of the base's.
    """
    affordable = [
        outcome for outcome in place.outcomes if outcome is not place.base and outcome.cost <= budget * (1 + SLACK)
    ]
    if not affordable:
        return Advice(budget, None, None, math.nan)
    best = max(affordable, key=lambda outcome: outcome.accuracy.mean)
    won = gain(best, place.base)
    return Advice(budget, best, won, half_width(won, len(affordable)))
