"""Accuracy against cost on image tasks: the comparison behind the studies ``frontier`` and ``longer``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.cost import Cost, measure
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.report import Table, colour, figure, labels_text, machines, publish, say
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import Estimate, estimate
from benchmarks.harness.tasks import TASKS, folder_for
from benchmarks.harness.training import Experiment, run_experiment
from benchmarks.harness.tuning import Method, Place, compare, name_of

BUDGETS = (1.0, 1.25, 1.5, 2.0)
SLACK = 0.05
"""How far over its budget a method may be, as a fraction: timings are no better than that."""

BASE = Method("base", "SGD or AdamW alone; its learning rate, which all use, is chosen")
BASE_TWICE = Method("base-twice", "the base with twice the epochs, and a learning rate of its own", compute=2.0)
_RENAMED = {
    "momentum-sam": "momentum-uphill",
    "momentum-sam-ahead": "momentum-ahead",
    "momentum-asam": "momentum-uphill-asam",
    "adam-step-sam": "adam-step-uphill",
    "lesam": "le-sam",
}
"""Names in rows from before 1.0, when "momentum-sam" was what is now "momentum-uphill"."""
_BEHIND_NAMES = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}


@dataclass(frozen=True)
class Arena:
    """A task with the base that suits its model, and how long to train.

    Attributes:
        place: The task, the base, its learning rates, the scale of radii.
        epochs: Passes over the training data.
        train_size: Training examples; None for all.
    """

    place: Place
    epochs: int
    train_size: int | None = None


_SGD, _ADAMW = (0.01, 0.03, 0.1), (1e-3, 3e-3, 1e-2)

# Sized so that the frontier takes about an hour of one core.
ARENAS = {
    arena.place.task: arena
    for arena in (
        Arena(Place("digits", "sgd", _SGD), epochs=20),
        Arena(Place("digits_vit", "adamw", _ADAMW, scale=0.3), epochs=15),
        Arena(Place("fashion_small", "sgd", _SGD), epochs=10, train_size=1000),
    )
}
"""By name of the task."""


@dataclass(frozen=True)
class Outcome:
    """A method in one place.

    Attributes:
        method: Its name; "base" for the base.
        label: With the setting that was chosen, as in "sam:rho=0.1".
        cost: Its step against the base's, nan where it was not measured.
        accuracies: For each seed, the fraction of the test examples classified rightly.
    """

    method: str
    label: str
    cost: float
    accuracies: Mapping[int, float]

    @property
    def accuracy(self) -> Estimate:
        """Over the seeds."""
        return estimate(self.accuracies.values())


@dataclass(frozen=True)
class Scene:
    """The outcomes on one task with one amount of label noise; for a mean over scenes the title says so."""

    title: str
    task: str
    outcomes: Sequence[Outcome]


def run(
    arenas: Sequence[Arena],
    methods: Sequence[Method],
    *,
    seeds: Sequence[int],
    label_noise: Sequence[float],
    data: Path | None,
    folder: Path,
    quick: bool,
    timed: tuple[int, int],
) -> None:
    """Make the runs that a folder lacks, then time the methods of every task that lacks some."""
    log = open_log(folder, restart=quick)
    by_task = {arena.place.task: arena for arena in arenas}

    def size(row: Row) -> tuple[float, int | None]:
        every = row.task in by_task and by_task[row.task].train_size is None
        epochs = round(row.settings["epochs"] / row.settings.get("compute", 1))
        return epochs, None if every else row.examples["train"]

    log.check(
        "(epochs, training examples)",
        size,
        lambda row: (by_task[row.task].epochs, by_task[row.task].train_size) if row.task in by_task else size(row),
    )

    def experiment(place: Place, choice: Choice, seed: int = 0, evaluate_on: str = "test") -> Experiment:
        arena, task = by_task[place.task], TASKS[place.task]
        epochs, noise = round(arena.epochs * choice.compute), place.label_noise
        how = {
            "train_size": arena.train_size,
            "data": folder_for(task, data),
            "evaluate_on": evaluate_on,
            "curves": False,
        }
        return Experiment(task, [choice], seed, noise, epochs, task.batch_size, **how)

    chosen = compare(
        log,
        [replace(arena.place, label_noise=noise) for arena in arenas for noise in label_noise],
        methods,
        seeds,
        lambda *trial: next(run_experiment(experiment(*trial)))[0],
        settings=lambda place, choice: experiment(place, choice).settings(choice),
        tune=not quick,
    )
    costs = open_log(folder, "costs.jsonl", Cost, restart=quick)
    for arena in arenas:
        choices = next(choices for place, choices in chosen if place.task == arena.place.task)
        names = {"base", *(name_of(choice.label) for choice in choices[1:])}
        if not names <= {cost.method for cost in costs.rows if cost.task == arena.place.task}:
            say(f"timing {len(choices)} methods on {arena.place.task}")
            for cost in measure(arena.place.task, choices, data, steps=timed[0], repetitions=timed[1]):
                costs.add(cost)


def scenes(rows: Sequence[Row], costs: Sequence[Cost]) -> list[Scene]:
    """Return what was measured on test data, by task and label noise, the base first in each."""
    ratios = {(cost.task, _renamed(cost.method)): cost.ratio for cost in costs}  # the newest of each
    found: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for row in rows:
        if row.evaluated_on == "test":
            name = name_of(row.optimizer)
            method = BASE.name if name == row.base else _renamed(name)
            found.setdefault((row.task, row.label_noise), {}).setdefault(method, []).append(row)
    return [
        Scene(
            f"{task}, {labels_text(noise)}",
            task,
            [
                Outcome(
                    name,
                    _label(name, runs[0].optimizer),
                    ratios.get((task, name), math.nan),
                    {row.seed: row.metrics["accuracy"] for row in runs},
                )
                for name, runs in sorted(methods.items(), key=lambda item: item[0] != BASE.name)
            ],
        )
        for (task, noise), methods in found.items()
        if BASE.name in methods
    ]


def overall(found: Sequence[Scene]) -> Scene:
    """Return the mean over scenes, seed by seed, of the methods that every scene has."""
    by_method = [{outcome.method: outcome for outcome in scene.outcomes} for scene in found]
    outcomes = []
    for method in by_method[0]:
        present = [methods[method] for methods in by_method if method in methods]
        seeds = [seed for seed in present[0].accuracies if all(seed in outcome.accuracies for outcome in present)]
        if len(present) == len(found) and seeds:
            mean = {seed: math.fsum(each.accuracies[seed] for each in present) / len(present) for seed in seeds}
            cost = math.fsum(each.cost for each in present) / len(present)
            outcomes.append(Outcome(method, method, cost, mean))
    return Scene("mean over all", "", outcomes)


def gain_of(outcome: Outcome, base: Outcome) -> Estimate:
    """Return a method's accuracy minus the base's, over the seeds that both have."""
    return estimate(value - base.accuracies[s] for s, value in outcome.accuracies.items() if s in base.accuracies)


def advise(scene: Scene, budget: float) -> tuple[Outcome | None, Estimate | None, int]:
    """Return the most accurate affordable method, its gain over the base, and from how many methods it was picked."""
    base, *others = scene.outcomes
    affordable = [outcome for outcome in others if outcome.cost <= budget * (1 + SLACK)]
    if not affordable:
        return None, None, 0
    best = max(affordable, key=lambda outcome: outcome.accuracy.mean)
    return best, gain_of(best, base), len(affordable)


def render(
    folder: Path,
    output: Path | None,
    summaries: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Write a folder's tables and its picture of accuracy against cost."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    costs = Log(folder / "costs.jsonl", Cost, must_exist=True).rows
    found = scenes(rows, costs)
    tables = [
        Table(
            "Which variant to use, by training cost",
            ("Where (accuracy of the base, %)", "Budget", "Use", "Gain over the base", "Its cost"),
            [
                (
                    f"{scene.title} ({scene.outcomes[0].accuracy.spread('.1f', 100)})",
                    f"{budget:g}x",
                    *_advice(scene, budget),
                )
                for scene in ([*found, overall(found)] if len(found) > 1 else found)
                for budget in BUDGETS
            ],
            text_columns=(1, 2, 3, 4),
        )
    ]
    for scene in found:
        spread = {_renamed(cost.method): cost for cost in costs if cost.task == scene.task}
        cells = [_cells(outcome, scene, spread.get(outcome.method), summaries) for outcome in scene.outcomes]
        headings = ("Method", "What it does", "n", "Cost, x base", "Accuracy, %", "Gain over the base")
        tables.append(Table(scene.title, headings, cells, text_columns=(1,)))
    shared = [
        "Accuracy: test accuracy after the last epoch, mean ± sample standard deviation over n seeds.",
        "Gain: accuracy minus the base's with the same seed, in points, with its 95% confidence interval by Student's "
        "t. In the first table the interval is widened (Bonferroni) for the number of methods that the best was picked "
        "from, and a method is named only where all of it is above 0.",
        "Cost: processor time of the method's steps divided by the base's, median (and 20% to 80% quantiles) of "
        f"{costs[0].repetitions} runs of {costs[0].steps} steps each, taken in turns in one process. A method is "
        f"within a budget if its cost is at most {100 * SLACK:g}% above it.",
    ]
    publish(output or folder, tables, [*shared, *notes, *machines(rows)], {"frontier.png": plot(found, costs)})


def plot(found: Sequence[Scene], costs: Sequence[Cost]) -> Figure:
    """Return accuracy against cost: a row of panels for each task, a column for each label noise.

    Drawn are the base and the methods that no cheaper one equals; a panel's title says from how many they are.
    """
    tasks = list(dict.fromkeys(scene.task for scene in found))
    columns = max(sum(scene.task == task for scene in found) for task in tasks)
    drawn, axes = figure(len(tasks), columns, width=4.4, height=2.7)
    for index, task in enumerate(tasks):
        of_task = {_renamed(cost.method): cost for cost in costs if cost.task == task}
        for ax, scene in zip(axes[index], [scene for scene in found if scene.task == task], strict=False):
            _draw(ax, scene, of_task)
        axes[index][0].set_ylabel("test accuracy (%)")
    for ax in axes[-1]:
        ax.set_xlabel("time of a step (multiples of the base's)")
    drawn.suptitle("methods that no cheaper one equals; bars: standard deviation over the seeds", fontsize=11)
    return drawn


def is_chosen(outcome: Outcome, scene: Scene) -> bool:
    """Return whether no cheaper method is as accurate; the base always is."""
    cheaper = [each for each in scene.outcomes if each.cost <= outcome.cost and each is not outcome]
    return outcome is scene.outcomes[0] or all(each.accuracy.mean < outcome.accuracy.mean for each in cheaper)


def _draw(ax: Axes, scene: Scene, costs: Mapping[str, Cost]) -> None:
    base = scene.outcomes[0]
    timed = [outcome for outcome in scene.outcomes if outcome.method in costs]
    chosen = sorted((each for each in timed if is_chosen(each, scene)), key=lambda each: each.cost)
    for index, outcome in enumerate(chosen):
        cost, mean, sd = costs[outcome.method], 100 * outcome.accuracy.mean, 100 * outcome.accuracy.sd
        sd = 0.0 if math.isnan(sd) else sd
        ax.errorbar(
            cost.ratio,
            mean,
            xerr=[[max(0.0, cost.ratio - cost.low)], [max(0.0, cost.high - cost.ratio)]],
            yerr=sd,
            fmt="o",
            color=colour(0 if outcome is base else 1),
            elinewidth=1.0,
        )
        # The points rise from left to right, so there is room for names right below them and left above them, in turn.
        above = bool(index % 2)
        place = {"ha": "right", "va": "bottom"} if above else {"ha": "left", "va": "top"}
        aside = (-6, 4) if above else (6, -4)
        point = (cost.ratio, mean)
        ax.annotate(outcome.method, point, aside, textcoords="offset points", fontsize=9, bbox=_BEHIND_NAMES, **place)
    ax.axhline(100 * base.accuracy.mean, color="black", linewidth=0.8, linestyle=":")
    ax.set_title(f"{scene.title} ({len(timed) - 1} methods tried)")
    right = max(1.9, 0.3 + max(each.cost for each in chosen))
    ax.set_xlim(1 - (right - 1) / 3, right)
    ax.margins(y=0.2)


def _advice(scene: Scene, budget: float) -> tuple[str, str, str]:
    best, won, picked_from = advise(scene, budget)
    if best is None or won is None:
        return "the base", "nothing else is this cheap", ""
    gained = won.interval(picked_from=picked_from)
    if won.mean - won.half_width(picked_from) > 0:
        return best.label, gained, f"{best.cost:.2f}x"
    return "the base", f"no method's interval excludes 0; nearest: {best.label}, {gained}", f"{best.cost:.2f}x"


def _cells(outcome: Outcome, scene: Scene, cost: Cost | None, summaries: Mapping[str, str]) -> tuple[str, ...]:
    base = scene.outcomes[0]
    return (
        outcome.label,
        summaries.get(outcome.method, ""),
        str(outcome.accuracy.n),
        "" if cost is None else f"{cost.ratio:.2f} ({cost.low:.2f} to {cost.high:.2f})",
        outcome.accuracy.spread(".1f", 100),
        "" if outcome is base else gain_of(outcome, base).interval(),
    )


def _label(method: str, optimizer: str) -> str:
    return optimizer if method == BASE.name else method + optimizer.removeprefix(name_of(optimizer))


def _renamed(name: str) -> str:
    return _RENAMED.get(name, name)
