"""``demo``: what the README promises, in under three minutes on two cores."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.choice import parse_choice
from benchmarks.commands.train import SHARPNESS_RHO, THREADS
from benchmarks.experiment import Experiment
from benchmarks.registry import COMMANDS, TASKS, Command
from benchmarks.results import run_and_render

__all__ = ["DEMO"]

_OPTIMIZERS = ("sgd", "sam", "asam", "adamw", "adamw+sam")
_LABEL_NOISE = (0.0, 0.4)
_EPOCHS = 20


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=arguments.seeds, default="0,1,2", help="default: %(default)s")
    parser.add_argument("--epochs", type=arguments.positive_int, default=_EPOCHS, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("results/demo"), help="folder, replaced (default: %(default)s)"
    )


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(THREADS)
    task = TASKS["digits"]
    experiment = Experiment(
        task=task,
        choices=[parse_choice(name) for name in _OPTIMIZERS],
        seeds=options.seeds,
        label_noise=_LABEL_NOISE,
        epochs=options.epochs,
        batch_size=task.batch_size,
        train_size=task.train_size,
        data=None,
        evaluate_on="test",
        sharpness_rho=SHARPNESS_RHO,
        device=torch.device("cpu"),
    )
    return run_and_render(experiment, options.output, Console(), overwrite=True)


DEMO = COMMANDS.add(
    Command(
        "demo",
        "train a small ConvNet on real digits, clean and with 40%% of the labels randomised; under three minutes",
        _add_arguments,
        _run,
    )
)
