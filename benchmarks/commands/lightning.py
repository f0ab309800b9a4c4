"""``lightning``: a LightningModule on Fashion-MNIST, with and without the callback, monitored."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.commands.train import THREADS
from benchmarks.errors import BenchmarkError
from benchmarks.lightning.methods import METHODS
from benchmarks.registry import COMMANDS, TASKS, Command
from benchmarks.results import INTERRUPTED

__all__ = ["LIGHTNING"]

_TASK = "fashion_small"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", type=_methods, default=",".join(METHODS), help="comma-separated (default: %(default)s)")
    add("--seeds", type=arguments.seeds, default="0,1,2", help="comma-separated (default: %(default)s)")
    add(
        "--label-noise",
        type=arguments.fractions,
        default="0,0.4",
        help="comma-separated fractions of the training labels to randomise (default: %(default)s)",
    )
    add("--epochs", type=arguments.positive_int, default=10, help="default: %(default)s")
    add("--train-size", type=arguments.positive_int, default=1000, help="default: %(default)s")
    add("--batch-size", type=arguments.positive_int, default=64, help="default: %(default)s")
    add("--data", help="folder with Fashion-MNIST, or 'hub' to download it; default: Debian's")
    add("--threads", type=arguments.positive_int, default=THREADS, help="CPU threads (default: %(default)s)")
    add("--output", type=Path, default=Path("results/lightning"), help="folder, continued (default: %(default)s)")
    add("--quick", action="store_true", help="an epoch of a few batches of two methods: does it run?")


def _run(options: argparse.Namespace) -> int:
    try:
        from benchmarks.lightning.comparison import Comparison, Plan
    except ImportError as error:
        raise BenchmarkError(str(error)) from error
    from benchmarks.lightning.report import markdown, plot, terminal_table

    torch.set_num_threads(options.threads)
    plan = Plan(
        methods=options.methods,
        seeds=options.seeds,
        label_noise=options.label_noise,
        epochs=options.epochs,
        train_size=options.train_size,
        batch_size=options.batch_size,
    )
    if options.quick:
        plan = Plan(("sgd", "sgd+sam"), (0,), (0.4,), epochs=2, train_size=128, batch_size=32, test_size=256)
    path = options.output / "runs.jsonl"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if options.quick:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--output {options.output} cannot be written: {error}; give another folder") from error
    console = Console()
    task = TASKS[_TASK]
    comparison = Comparison(
        plan,
        task,
        task.load(options.data),
        options.output,
        lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
    try:
        comparison.run()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last finished run")
        return INTERRUPTED
    console.print(terminal_table(comparison.rows))
    (options.output / "table.md").write_text(markdown(comparison.rows), encoding="utf-8")
    plot(comparison.rows, options.output / "lightning.png")
    console.print(f"wrote {path}, table.md, lightning.png and monitor.png", highlight=False, soft_wrap=True)
    return 0


def _methods(text: str) -> list[str]:
    return arguments.names("a method", text, METHODS, "sgd,sgd+sam")


LIGHTNING = COMMANDS.add(
    Command(
        "lightning",
        "a LightningModule on Fashion-MNIST with and without the callback, its sharpness in the logs",
        _add_arguments,
        _run,
    )
)
