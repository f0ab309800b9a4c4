"""``sharpness``: train, then measure how sharp each optimizer's model is."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.commands.train import SHARPNESS_RHO, THREADS
from benchmarks.errors import BenchmarkError
from benchmarks.experiment import Experiment
from benchmarks.registry import COMMANDS, TASKS, Command
from benchmarks.results import INTERRUPTED
from benchmarks.sharpness_study.figures import plot
from benchmarks.sharpness_study.report import markdown
from benchmarks.sharpness_study.study import run_study

__all__ = ["SHARPNESS"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", required=True, help=f"one of: {', '.join(TASKS.names())}")
    add("--optimizers", type=arguments.choices, default="sgd,sam,asam", help="comma-separated (default: %(default)s)")
    add("--seeds", type=arguments.seeds, default="0,1,2", help="comma-separated (default: %(default)s)")
    add(
        "--label-noise",
        type=arguments.fractions,
        default="0,0.4",
        help="comma-separated fractions of the training labels to randomise (default: %(default)s)",
    )
    add("--epochs", type=arguments.positive_int, help="default: the task's")
    add("--train-size", type=arguments.positive_int, help="training examples, drawn by seed; default: the task's")
    add("--data", help="as for train")
    add(
        "--output",
        type=Path,
        default=Path("results/sharpness"),
        help="folder, continued; may hold several tasks (default: %(default)s)",
    )


def _run(options: argparse.Namespace) -> int:
    task = TASKS[options.task]
    torch.set_num_threads(THREADS)
    experiment = Experiment(
        task=task,
        choices=options.optimizers,
        seeds=options.seeds,
        label_noise=options.label_noise,
        epochs=options.epochs or task.epochs,
        batch_size=task.batch_size,
        train_size=options.train_size or task.train_size,
        data=options.data,
        evaluate_on="test",
        sharpness_rho=SHARPNESS_RHO,
        device=torch.device("cpu"),
    )
    console = Console()
    folder = options.output
    path = folder / "runs.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--output {folder} cannot be written: {error}; give another folder") from error
    try:
        with console.status("training and measuring"):
            rows = run_study(
                experiment, path, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
            )
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last finished seed")
        return INTERRUPTED
    table = markdown(rows)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    (folder / "table.md").write_text(table, encoding="utf-8")
    figures = plot(rows, folder)
    console.print(f"wrote {path}, table.md, {', '.join(figure.name for figure in figures)}", highlight=False)
    return 0


SHARPNESS = COMMANDS.add(
    Command(
        "sharpness",
        "train optimizers on a task, then measure how sharp each model is, by several measures",
        _add_arguments,
        _run,
    )
)
