"""Does ``samopt.find_rho`` find a radius that is good at the end of the whole run?"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.nn import functional

import samopt
from benchmarks.harness.cli import Fraction
from benchmarks.harness.data import stream
from benchmarks.harness.errors import choose
from benchmarks.harness.frontier import ARENAS, BASE, Arena
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.tasks import TASKS, folder_for
from benchmarks.harness.training import Experiment, Run, build_model
from benchmarks.harness.tuning import Method, thirds

# What the frontier chose on validation data for the base, docs/results/frontier-again.
_RATES = {
    ("digits", 0.0): 0.03,
    ("digits", 0.4): 0.01,
    ("digits_vit", 0.0): 0.003,
    ("digits_vit", 0.4): 0.003,
    ("fashion_small", 0.0): 0.03,
    ("fashion_small", 0.4): 0.1,
}
_SAM = Method("sam", "SAM, two passes", "sam", thirds(0.1))


def study(
    tasks: list[str] = list(ARENAS),
    seeds: list[NonNegativeInt] = [0],
    label_noise: list[Fraction] = [0.0, 0.4],
    steps: PositiveInt = 300,
    folds: PositiveInt = 4,
    data: Path | None = None,
    threads: PositiveInt = 1,
    output: Path = Path("results/find-rho"),
    quick: bool = False,
) -> None:
    """Train the base, SAM at the frontier's three radii, and SAM at the radius that ``find_rho`` returns, in full.

    Args:
        tasks: Comma-separated.
        seeds: Comma-separated.
        label_noise: Comma-separated fractions of the training labels to randomise.
        steps: Of ``find_rho``, at most; never more than the whole run has.
        folds: Of ``find_rho``.
        data: Folder of Fashion-MNIST's four files; by default where Debian puts them.
        threads: CPU threads.
        output: Folder; its rows.jsonl is continued.
        quick: One task, an epoch on a few images.
    """
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and not quick else []
    done = {(row["arena"], row["noise"], row["seed"]) for row in rows}
    if quick:
        tasks, seeds, label_noise, steps = ["digits"], [0], [0.4], 4
    with file.open("w" if quick else "a") as log:
        for seed in seeds:
            for name in tasks:
                for noise in label_noise:
                    if (name, noise, seed) not in done:
                        arena = choose("task", name, ARENAS)
                        row = check(arena, noise, seed, steps=steps, folds=folds, data=data, quick=quick)
                        print(json.dumps(row), file=log, flush=True)
                        print(json.dumps(row), flush=True)


def check(
    arena: Arena, noise: float, seed: int, *, steps: int, folds: int, data: Path | None = None, quick: bool = False
) -> dict[str, Any]:
    """Return the accuracies at the end of all runs, in percent, and what ``find_rho`` chose."""
    place = arena.place
    task, lr = TASKS[place.task], _RATES[place.task, noise]
    experiment = Experiment(
        task,
        (),
        seed,
        noise,
        epochs=1 if quick else arena.epochs,
        batch_size=task.batch_size,
        train_size=512 if quick else arena.train_size,
        data=folder_for(task, data),
        curves=False,
    )
    split = experiment.split()
    base = next(choice for choice in place.candidates(BASE, lr) if choice.base_settings["lr"] == lr)

    def final(rho: float) -> float:
        choice = Choice(f"sam:rho={rho:g}", base.base, base.base_settings, "sam", {"rho": rho}) if rho else base
        run = Run(experiment, choice, split)
        for epoch in range(experiment.epochs):
            run.train_epoch(measure=epoch + 1 == experiment.epochs)
        return 100 * run.curves["accuracy"][-1]

    order = torch.randperm(len(split.labels), generator=stream(seed, "batches of find_rho"))
    order = order[: len(order) // task.batch_size * task.batch_size]
    batches = [(split.inputs[part], split.labels[part]) for part in torch.split(order, task.batch_size)]
    model = build_model(task.build_model, seed)
    steps = min(steps, len(batches) * experiment.epochs)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = samopt.find_rho(
            model,
            functional.cross_entropy,
            batches,
            optimizer=base.build(model),
            steps=steps,
            folds=folds,
            progress=False,
        )
    seconds = time.process_time() - start
    alone = final(0.0)
    tuned = {float(choice.options["rho"]): final(choice.options["rho"]) for choice in place.candidates(_SAM, lr)}
    found = alone if search.rho is None else tuned.get(search.rho) or final(search.rho)
    return {
        "arena": place.task,
        "noise": noise,
        "seed": seed,
        "rho": search.rho,
        "gains": dict(zip(search.radii, search.gains, strict=True)),
        "errors": dict(zip(search.radii, search.errors, strict=True)),
        "fold_gains": dict(zip(search.radii, search.fold_gains, strict=True)),
        "loss_rises": dict(zip(search.radii, search.loss_rises, strict=True)),
        "steps": steps,
        "folds": folds,
        "gradients": search.cost,
        "cpu_seconds": seconds,
        "base": alone,
        "tuned": tuned,
        "test_examples": len(split.test_labels),
        "found": found,
        "among_best_two": found >= sorted(tuned.values())[-2],
        "above_base_less_one": found >= alone - 1,
    }
