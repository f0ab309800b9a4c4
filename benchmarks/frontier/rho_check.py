"""Does ``samopt.find_rho`` find a radius that is good at the end of the whole run? ``python -m`` this module.

For each arena, amount of label noise and seed: the base, SAM at the three radii that the frontier tunes over, and SAM
at the radius that ``find_rho`` returns from fresh weights and the training batches, all trained in full and measured
on clean test labels. A row of JSON each.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

import benchmarks.optimizers  # noqa: F401  # registers what it holds
import benchmarks.tasks  # noqa: F401
import samopt
from benchmarks.data import make_split
from benchmarks.frontier.arenas import ARENAS
from benchmarks.frontier.methods import BASE, METHODS
from benchmarks.registry import OPTIMIZERS, TASKS
from benchmarks.seeds import stream
from benchmarks.training import Run, build_model

__all__ = ["check", "main"]

# What the frontier chose on validation data for the base, docs/results/frontier-again.
_RATES = {
    ("digits", 0.0): 0.03,
    ("digits", 0.4): 0.01,
    ("digits_vit", 0.0): 0.003,
    ("digits_vit", 0.4): 0.003,
    ("fashion_small", 0.0): 0.03,
    ("fashion_small", 0.4): 0.1,
}


def check(name: str, noise: float, seed: int, *, data: str | None, steps: int, folds: int) -> dict[str, Any]:
    """Return the accuracies at the end of all runs, in percent, and what ``find_rho`` chose.

    Args:
        name: Of the arena.
        noise: Fraction of random training labels.
        seed: Decides everything random.
        data: Where the task's data is.
        steps: Of ``find_rho``, at most; never more than the whole run has.
        folds: Of ``find_rho``.
    """
    arena, task, lr = ARENAS[name], TASKS[name], _RATES[name, noise]
    split = make_split(
        task.load(data), seed, classes=task.classes, train_size=arena.train_size, label_noise=noise, evaluate_on="test"
    )
    whole = len(split.labels) // task.batch_size * arena.epochs

    def final(rho: float) -> float:
        choice = METHODS["sam"].choice(arena, lr, rho) if rho else BASE.choice(arena, lr, lr)
        run = Run(
            task.build_model,
            choice,
            split,
            seed,
            epochs=arena.epochs,
            batch_size=task.batch_size,
            sharpness_rho=0.05,
            device=torch.device("cpu"),
        )
        for epoch in range(arena.epochs):
            run.train_epoch(measure=epoch + 1 == arena.epochs)
        return 100 * run.curves.accuracy[-1]

    model = build_model(task.build_model, seed)
    case = OPTIMIZERS[arena.base]
    order = torch.randperm(len(split.labels), generator=stream(seed, "batches of find_rho"))
    order = order[: len(order) // task.batch_size * task.batch_size]
    batches = [(split.inputs[part], split.labels[part]) for part in torch.split(order, task.batch_size)]
    start = time.perf_counter()
    search = samopt.find_rho(
        model,
        functional.cross_entropy,
        batches,
        optimizer=case.build(model, dict(case.defaults) | {"lr": lr}),
        steps=min(steps, whole),
        folds=folds,
        progress=False,
    )
    seconds = time.perf_counter() - start
    base = final(0.0)
    tuned = {rho: final(rho) for rho in METHODS["sam"].values_in(arena)}
    found = base if search.rho is None else tuned.get(search.rho) or final(search.rho)
    return {
        "arena": name,
        "noise": noise,
        "seed": seed,
        "rho": search.rho,
        "gains": dict(zip(search.radii, search.gains, strict=True)),
        "errors": dict(zip(search.radii, search.errors, strict=True)),
        "steps": min(steps, whole),
        "seconds": seconds,
        "base": base,
        "tuned": tuned,
        "found": found,
        "among_best_two": found >= sorted(tuned.values())[-2],
        "above_base_less_one": found >= base - 1,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Those of the command line; None for the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arenas", default="digits,digits_vit,fashion_small")
    parser.add_argument("--noise", default="0,0.4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--fashion", default=None, help="folder of Fashion-MNIST")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed in map(int, options.seeds.split(",")):
        for name in options.arenas.split(","):
            for noise in map(float, options.noise.split(",")):
                data = options.fashion if name == "fashion_small" else None
                row = check(name, noise, seed, data=data, steps=options.steps, folds=options.folds)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
