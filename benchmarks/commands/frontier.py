"""``frontier``: test accuracy against training cost for every way to be sharpness-aware."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.choice import Choice
from benchmarks.commands.train import THREADS
from benchmarks.errors import BenchmarkError
from benchmarks.frontier.advice import places
from benchmarks.frontier.arenas import ARENAS, Arena
from benchmarks.frontier.comparison import Comparison, Plan
from benchmarks.frontier.cost import Cost, measure, read_costs, write_costs
from benchmarks.frontier.methods import BASE, METHODS, name_of
from benchmarks.frontier.report import advice_table, markdown, plot
from benchmarks.registry import COMMANDS, Command
from benchmarks.results import INTERRUPTED

__all__ = ["FRONTIER"]

_QUICK = Plan(
    arenas=[replace(ARENAS[name], epochs=1, train_size=256) for name in ("digits", "digits_vit")],
    methods=("base", "asam", "momentum-asam", "asam-every-2"),
    seeds=(0,),
    label_noise=(0.4,),
    tune=False,
)
_TIMED = {"steps": 20, "repetitions": 7}
_TIMED_QUICKLY = {"steps": 4, "repetitions": 2}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", type=_methods, help=f"comma-separated, of {', '.join(METHODS)} (default: all)")
    add("--tasks", type=_arenas, help=f"comma-separated, of {', '.join(ARENAS)} (default: all)")
    add("--seeds", type=arguments.seeds, default="0,1,2,3,4", help="of the final runs (default: %(default)s)")
    add(
        "--label-noise",
        type=arguments.fractions,
        default="0,0.4",
        help="comma-separated fractions of the training labels to randomise (default: %(default)s)",
    )
    add("--epochs", type=arguments.positive_int, help="default: each task's")
    add("--train-size", type=arguments.positive_int, help="training examples, drawn by seed; default: each task's")
    add("--threads", type=arguments.positive_int, default=THREADS, help="CPU threads (default: %(default)s)")
    add("--output", type=Path, default=Path("results/frontier"), help="folder, continued (default: %(default)s)")
    add("--quick", action="store_true", help="a few steps of a few methods, nothing chosen: does it run?")


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    plan = _QUICK if options.quick else _plan(options)
    path, costs_path = options.output / "runs.jsonl", options.output / "costs.jsonl"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if options.quick:
            path.unlink(missing_ok=True)
            costs_path.unlink(missing_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--output {options.output} cannot be written: {error}; give another folder") from error
    console = Console()
    comparison = Comparison(plan, path, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    try:
        with console.status("training"):
            chosen = comparison.run()
        with console.status("timing steps"):
            costs = _costs(costs_path, chosen, **(_TIMED_QUICKLY if options.quick else _TIMED))
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last finished run")
        return INTERRUPTED
    found = places(comparison.rows, costs)
    console.print(advice_table(found))
    (options.output / "table.md").write_text(markdown(found, comparison.rows, costs), encoding="utf-8")
    plot(found, costs, options.output / "frontier.png")
    console.print(f"wrote {path}, costs.jsonl, table.md and frontier.png", highlight=False, soft_wrap=True)
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    arenas = options.tasks or list(ARENAS.values())
    return Plan(
        arenas=[
            replace(arena, epochs=options.epochs or arena.epochs, train_size=options.train_size or arena.train_size)
            for arena in arenas
        ],
        methods=options.methods or list(METHODS),
        seeds=options.seeds,
        label_noise=options.label_noise,
        tune=True,
    )


def _costs(path: Path, chosen: dict[str, list[Choice]], *, steps: int, repetitions: int) -> list[Cost]:
    """Return the costs in a file, of tasks that lack some after measuring all of that task's anew."""
    costs = read_costs(path)
    for task, choices in chosen.items():
        known = {cost.method for cost in costs if cost.task == task}
        if not {_name(choice) for choice in choices} <= known:
            others = [cost for cost in costs if cost.task != task]
            costs = [*others, *measure(task, choices, steps=steps, repetitions=repetitions)]
            write_costs(path, costs)
    return costs


def _name(choice: Choice) -> str:
    return BASE.name if choice.case.name == choice.case.base else name_of(choice.label)


def _methods(text: str) -> list[str]:
    names = arguments.names("a method", text, METHODS, "base,sam,momentum-asam")
    return names if BASE.name in names else [BASE.name, *names]


def _arenas(text: str) -> list[Arena]:
    return [ARENAS[name] for name in arguments.names("a task", text, ARENAS, "digits,digits_vit")]


FRONTIER = COMMANDS.add(
    Command(
        "frontier",
        "test accuracy against training cost for every way to be sharpness-aware, and which to use at which cost",
        _add_arguments,
        _run,
    )
)
