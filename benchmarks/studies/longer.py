"""Ten times the steps: do the gains of short runs stay, and why does LookSAM not learn on the transformer."""

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
from benchmarks.studies.frontier import METHODS as SHORT

_LOOK = thirds(0.1)

METHODS = {
    method.name: method
    for method in (
        BASE,
        BASE_TWICE,
        *(SHORT[name] for name in ("sam", "asam", "momentum-ahead", "sam-last-half", "le-sam")),
        *(SHORT[name] for name in ("looksam", "looksam-layers", "looksam-layers-little")),
        Method("looksam-warm", "LookSAM, norms over all weights, the radius rising in the first tenth", "looksam",
               _LOOK, options={"alpha": 0.7, "per_tensor": False}, schedule={"rho_warmup": 0.1}),
        Method("looksam-little", "LookSAM, alpha 0.1, norms over all weights", "looksam", _LOOK,
               options={"alpha": 0.1, "per_tensor": False}),
    )
}  # fmt: skip
"""By name, the base first."""


def study(
    methods: list[str] = list(METHODS),
    tasks: list[str] = list(ARENAS),
    seeds: list[NonNegativeInt] = [0, 1, 2, 3, 4],
    label_noise: list[Fraction] = [0.0, 0.4],
    times: PositiveInt = 10,
    data: Path | None = None,
    threads: PositiveInt = 1,
    output: Path = Path("results/longer"),
    quick: bool = False,
) -> None:
    """Choose every method's settings and test it, as the frontier does, in longer runs.

    Args:
        methods: Comma-separated; see the default for all. The base is always among them.
        tasks: Comma-separated.
        seeds: Of the tests, comma-separated.
        label_noise: Comma-separated fractions of the training labels to randomise.
        times: How many times the frontier's epochs.
        data: Folder of Fashion-MNIST's four files; by default where Debian puts them.
        threads: CPU threads.
        output: Folder, continued.
        quick: An epoch of a few methods on a few images, nothing chosen.
    """
    torch.set_num_threads(threads)
    arenas = [choose("task", task, ARENAS) for task in tasks]
    arenas = [replace(arena, epochs=times * arena.epochs) for arena in arenas]
    if quick:
        arenas = [replace(ARENAS["digits_vit"], epochs=1, train_size=256)]
        methods, seeds, label_noise = ["base-twice", "looksam", "looksam-layers"], [0], [0.0]
    chosen = [choose("method", name, METHODS) for name in dict.fromkeys(["base", *methods])]
    timed = (10, 2) if quick else (20, 7)
    frontier.run(
        arenas, chosen, seeds=seeds, label_noise=label_noise, data=data, folder=output, quick=quick, timed=timed
    )
    render(output)


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    notes = [
        "Every setting was chosen from three values on validation data in runs of the same length, with a seed of its "
        "own: first the base's learning rate, which all methods use, then each method's radius."
    ]
    frontier.render(folder, output, {method.name: method.summary for method in METHODS.values()}, notes)
