"""``train``: any optimizers on any task."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.data import EVALUATION_SETS
from benchmarks.environment import select_device
from benchmarks.errors import BenchmarkError
from benchmarks.experiment import Experiment
from benchmarks.registry import COMMANDS, TASKS, Command
from benchmarks.results import run_and_render

__all__ = ["SHARPNESS_RHO", "THREADS", "TRAIN"]

SHARPNESS_RHO = 0.05
# Models this small gain little from a second thread and lose much where something else wants its core; and the same
# number everywhere gives the same results everywhere.
THREADS = 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", required=True, help=f"one of: {', '.join(TASKS.names())}")
    add(
        "--optimizers",
        type=arguments.choices,
        default="sgd,sam,asam,adamw,adamw+sam",
        help="comma-separated (default: %(default)s)",
    )
    add("--seeds", type=arguments.seeds, default="0,1,2", help="comma-separated (default: %(default)s)")
    add(
        "--label-noise",
        type=arguments.fractions,
        default="0",
        help="comma-separated fractions of the training labels to randomise (default: %(default)s)",
    )
    add("--epochs", type=arguments.positive_int, help="default: the task's")
    add("--batch-size", type=arguments.positive_int, help="default: the task's")
    add("--train-size", type=arguments.positive_int, help="training examples, drawn by seed; default: the task's")
    add("--data", help="folder with the task's data, or 'hub' to download it; default: where the task looks")
    add("--evaluate-on", default="test", help="test, or validation to choose settings (default: %(default)s)")
    add("--sharpness-rho", type=arguments.positive_number, default=SHARPNESS_RHO, help="default: %(default)s")
    add("--device", default="cpu", help="as torch names it (default: %(default)s)")
    add("--threads", type=arguments.positive_int, default=THREADS, help="CPU threads (default: %(default)s)")
    add("--output", type=Path, help="folder for the results (default: results/TASK)")
    add("--overwrite", action="store_true", help="replace earlier results there")


def _run(options: argparse.Namespace) -> int:
    task = TASKS[options.task]
    if options.evaluate_on not in EVALUATION_SETS:
        raise BenchmarkError(
            f"--evaluate-on must be one of {', '.join(EVALUATION_SETS)}, got {options.evaluate_on!r}; leave it out "
            "for the test set"
        )
    torch.set_num_threads(options.threads)
    experiment = Experiment(
        task=task,
        choices=options.optimizers,
        seeds=options.seeds,
        label_noise=options.label_noise,
        epochs=options.epochs or task.epochs,
        batch_size=options.batch_size or task.batch_size,
        train_size=options.train_size or task.train_size,
        data=options.data,
        evaluate_on=options.evaluate_on,
        sharpness_rho=options.sharpness_rho,
        device=select_device(options.device),
    )
    folder = options.output or Path("results") / task.name
    return run_and_render(experiment, folder, Console(), overwrite=options.overwrite)


TRAIN = COMMANDS.add(
    Command("train", "train any optimizers on a task, then show and write results", _add_arguments, _run)
)
