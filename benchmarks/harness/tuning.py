"""A comparison: settings chosen on validation data, the same number of trials for all, then tests from every seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.optimizers import BASES, Choice
from benchmarks.harness.report import labels_text, say
from benchmarks.harness.rows import Log, Row

TUNING_SEED = 1000
"""Seed of the runs that choose settings; no result is from it."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: Its name at the command line and in rows.
        summary: What it does, in a few words.
        variant: See ``Choice``; None for the base alone.
        values: What its setting is chosen from, smallest first; for the base the learning rates come from the place,
            and a method without a variant takes these multiples of the base's.
        setting: The setting that is chosen.
        options: Further options; see ``Choice``.
        schedule: Of rho; see ``optimizers.SCHEDULE``.
        bases: The bases that it can wrap.
        compute: How many times the epochs it trains: 2 for the base makes a row of the same compute as two passes.
    """

    name: str
    summary: str
    variant: str | None = None
    values: tuple[float, ...] = ()
    setting: str = "rho"
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, float] = field(default_factory=dict)
    bases: tuple[str, ...] = tuple(BASES)
    compute: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where methods meet.

    Attributes:
        task: The task's name.
        base: Name of the base that every method wraps.
        learning_rates: What the base's learning rate is chosen from, smallest first.
        label_noise: Fraction of the training labels to randomise.
        scale: Of every radius: a transformer takes smaller ones.
        base_settings: The base's other settings; None for its defaults.
        joint: Whether each method chooses its learning rate together with its setting. Otherwise all methods take the
            base's. Give the base as many learning rates as a method has pairs.
    """

    task: str
    base: str
    learning_rates: tuple[float, ...]
    label_noise: float = 0.0
    scale: float = 1.0
    base_settings: Mapping[str, float] | None = None
    joint: bool = False

    def candidates(self, method: Method, base_lr: float) -> list[Choice]:
        """Return what a method's settings are chosen from, smallest first."""
        defaults = BASES[self.base] if self.base_settings is None else self.base_settings
        extra = {} if method.compute == 1 else {"compute": method.compute}
        if method.variant is None:
            name = method.name if extra or method.values else self.base
            rates = [float(f"{value * base_lr:.3g}") for value in method.values] or self.learning_rates
            return [Choice(f"{name}:lr={lr:g}", self.base, {**defaults, "lr": lr}, schedule=extra) for lr in rates]
        values = [float(f"{value * self.scale:.3g}") for value in method.values]
        rates = thin(self.learning_rates, len(values)) if self.joint else [base_lr]
        return [
            Choice(
                f"{method.name}:{f'lr={lr:g}:' if self.joint else ''}{method.setting}={value:g}",
                self.base,
                {**defaults, "lr": lr},
                method.variant,
                {**method.options, method.setting: value},
                {**method.schedule, **extra},
            )
            for lr in rates
            for value in values
        ]


Train = Callable[[Place, Choice, int, str], Row]
"""Makes one run: where, with what, its seed, and "test" or "validation"."""


def compare(
    log: Log[Row],
    places: Sequence[Place],
    methods: Sequence[Method],
    seeds: Sequence[int],
    train: Train,
    *,
    settings: Callable[[Place, Choice], Mapping[str, Any]],
    tune: bool = True,
    metric: str = "accuracy",
    sign: int = 1,
) -> list[tuple[Place, list[Choice]]]:
    """Choose every method's settings in every place, run all from every seed, and return the choices.

    Runs that the log has are not made again. The base chooses first. Settings are chosen by the validation metric of
    one run with ``TUNING_SEED``, the first of equals; without ``tune`` the middle candidate is taken.

    Args:
        log: Where rows go.
        places: The places.
        methods: The base first.
        seeds: Of the tests.
        train: Makes one run.
        settings: What the row of a choice says about its settings, by which it is found again.
        tune: Whether to choose settings.
        metric: What to choose by.
        sign: 1 where more is better, -1 where less is.
    """

    def run(place: Place, choice: Choice, seed: int, evaluate_on: str) -> Row:
        found = log.find(
            task=place.task,
            optimizer=choice.label,
            seed=seed,
            label_noise=place.label_noise,
            evaluated_on=evaluate_on,
            settings=dict(settings(place, choice)),
        )
        if found is None:
            start = time.perf_counter()
            found = train(place, choice, seed, evaluate_on)
            log.add(found)
            say(
                f"[{len(log.rows)}] {place.task}, {labels_text(place.label_noise)}, {evaluate_on}, seed {seed}: "
                f"{choice.label}: {metric} {found.metrics[metric]:.4g} ({time.perf_counter() - start:.1f} s)"
            )
        return found

    def score(place: Place, choice: Choice) -> float:
        value = sign * run(place, choice, TUNING_SEED, "validation").metrics[metric]
        return -math.inf if math.isnan(value) else value

    chosen: list[tuple[Place, list[Choice]]] = []
    for place in places:
        base_lr, choices = math.nan, []
        for method in methods:
            if place.base in method.bases:
                candidates = place.candidates(method, base_lr)
                scores = [score(place, choice) for choice in candidates] if tune else []
                best = candidates[scores.index(max(scores)) if tune else len(candidates) // 2]
                choices.append(best)
                base_lr = best.base_settings["lr"] if math.isnan(base_lr) else base_lr
        chosen.append((place, choices))
    for seed in seeds:
        for place, choices in chosen:
            for choice in choices:
                run(place, choice, seed, "test")
    return chosen


def name_of(label: str) -> str:
    """Return the method or the base that a row's label begins with, as "sam" of "sam:rho=0.1"."""
    return label.partition(":")[0]


def thirds(centre: float) -> tuple[float, float, float]:
    """Return about a third of a value, the value, and three times it."""
    low, middle, high = (float(f"{centre * factor:.3g}") for factor in (0.3, 1.0, 3.0))
    return low, middle, high


def thin(values: Sequence[float], count: int) -> list[float]:
    """Return ``count`` of the values, evenly spaced, the middle one among them."""
    step = max(1, len(values) // count)
    return list(values[step // 2 :: step])[:count]
