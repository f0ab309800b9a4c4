"""Test accuracy against training cost for every variant, and which to use at which cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from benchmarks.harness import frontier
from benchmarks.harness.cli import Fraction
from benchmarks.harness.errors import choose
from benchmarks.harness.frontier import ARENAS, BASE, BASE_TWICE
from benchmarks.harness.tuning import Method, thirds
from samopt.parts.direction import ReusedGradient

_L2, _ADAPTIVE = thirds(0.1), thirds(0.3)
_LATE, _LAST_QUARTER = {"rho_from": 0.5}, {"rho_from": 0.75}

METHODS = {
    method.name: method
    for method in (
        BASE,
        BASE_TWICE,
        Method("sam", "SAM, two passes", "sam", _L2),
        Method("asam", "ASAM, two passes", "asam", _ADAPTIVE),
        Method("momentum-ahead", "momentum SAM: ahead along the momentum, one pass", "momentum-sam", thirds(1.0)),
        Method("momentum-uphill", "uphill along the momentum, one pass", "momentum-sam", _L2, options={"uphill": True}),
        Method("momentum-uphill-asam", "the same with ASAM's geometry, one pass", "momentum-sam", _ADAPTIVE,
               options={"adaptive": True, "uphill": True}),
        Method("adam-step-uphill", "uphill along Adam's own step, one pass", "momentum-sam", _L2,
               options={"preconditioned": True, "uphill": True}, bases=("adamw",)),
        Method("sam-last-half", "SAM from half of the run on", "sam", _L2, schedule=_LATE),
        Method("asam-last-half", "ASAM from half of the run on", "asam", _ADAPTIVE, schedule=_LATE),
        Method("asam-last-quarter", "ASAM in the last quarter", "asam", _ADAPTIVE, schedule=_LAST_QUARTER),
        Method("sam-every-2", "SAM at every second step", "sam", _L2, schedule={"rho_every": 2}),
        Method("asam-every-2", "ASAM at every second step", "asam", _ADAPTIVE, schedule={"rho_every": 2}),
        Method("asam-every-4", "ASAM at every fourth step", "asam", _ADAPTIVE, schedule={"rho_every": 4}),
        Method("asam-quarter", "ASAM, ascent on a quarter of the batch", "asam", _ADAPTIVE,
               options={"direction": ReusedGradient}, schedule={"ascent_part": 0.25}),
        Method("looksam", "LookSAM, SAM at every fifth step, norms over all weights", "looksam", _L2,
               options={"alpha": 0.7, "per_tensor": False}),
        Method("looksam-layers", "LookSAM, SAM at every fifth step, norms of each tensor", "looksam", _L2,
               options={"alpha": 0.7}),
        Method("looksam-layers-little", "the same, alpha 0.1", "looksam", _L2, options={"alpha": 0.1}),
        Method("friendly-sam", "Friendly SAM, two passes", "friendly-sam", _L2),
        Method("gsam", "GSAM, two passes", "gsam", _L2),
        Method("wsam", "WSAM, two passes", "wsam", _L2),
        Method("wsam-coupled", "WSAM, all of it through the base, two passes", "wsam", _L2,
               options={"decouple": False}),
        Method("fisher-sam", "Fisher SAM, two passes", "fisher-sam", _L2),
        Method("functional-sam", "Functional SAM, two passes", "functional-sam", _L2),
        Method("tram", "TRAM, distance from the previous step, two passes", "tram", thirds(1.0), setting="scale",
               options={"max_radius": 2.0}),
        Method("le-sam", "LE-SAM, two passes, a loss budget", "le-sam", _L2, setting="budget"),
    )
}  # fmt: skip
"""By name, the base first; each with the one setting that is chosen on validation data, from three values."""

_QUICK = ("base", "asam", "momentum-uphill-asam", "asam-every-2")


def study(
    methods: list[str] = list(METHODS),
    tasks: list[str] = list(ARENAS),
    seeds: list[NonNegativeInt] = [0, 1, 2, 3, 4],
    label_noise: list[Fraction] = [0.0, 0.4],
    epochs: PositiveInt | None = None,
    train_size: PositiveInt | None = None,
    data: Path | None = None,
    threads: PositiveInt = 1,
    output: Path = Path("results/frontier"),
    quick: bool = False,
) -> None:
    """Choose every method's settings, test it from every seed, and time it.

    Args:
        methods: Comma-separated; see the default for all. The base is always among them.
        tasks: Comma-separated.
        seeds: Of the tests, comma-separated.
        label_noise: Comma-separated fractions of the training labels to randomise.
        epochs: Passes over the training data; by default each task's number.
        train_size: Training examples, drawn by seed; by default each task's number.
        data: Folder of Fashion-MNIST's four files; by default where Debian puts them.
        threads: CPU threads.
        output: Folder, continued.
        quick: A few steps of a few methods, nothing chosen.
    """
    torch.set_num_threads(threads)
    arenas = [choose("task", task, ARENAS) for task in tasks]
    arenas = [replace(a, epochs=epochs or a.epochs, train_size=train_size or a.train_size) for a in arenas]
    if quick:
        arenas = [replace(ARENAS[name], epochs=1, train_size=256) for name in ("digits", "digits_vit")]
        methods, seeds, label_noise = list(_QUICK), [0], [0.4]
    chosen = [choose("method", name, METHODS) for name in dict.fromkeys(["base", *methods])]
    timed = (4, 2) if quick else (20, 7)
    frontier.run(
        arenas, chosen, seeds=seeds, label_noise=label_noise, data=data, folder=output, quick=quick, timed=timed
    )
    render(output)


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    notes = [
        "Every setting was chosen from three values on validation data, with a seed of its own: first the base's "
        "learning rate, which all methods use, then each method's radius."
    ]
    frontier.render(folder, output, {method.name: method.summary for method in METHODS.values()}, notes)
