"""The command line: help, errors and exit codes; each command lives in its own module under ``commands``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence

from benchmarks import commands, optimizers, tasks
from benchmarks.errors import BenchmarkError
from benchmarks.registry import COMMANDS, OPTIMIZERS, TASKS
from benchmarks.results import INTERRUPTED

__all__ = ["main"]

REGISTERED_BY = (commands, optimizers, tasks)
_USAGE_ERROR = 2
_WIDTH = 100

_OUTPUT = """\
output (a folder, results/... unless --output names another):
  runs.jsonl     one line a run, written as runs finish: task, optimizer, every setting, seed, label
                 noise, numbers of examples, final metrics, curves, commit, versions, device,
                 threads, time
  table.md       the tables shown at the end: for each optimizer, mean and sample standard deviation
                 over the seeds of the test accuracy and of its gain over the base with the same
                 seed; train loss; milliseconds a step, also as a multiple of the base's; sharpness
  TASK-accuracy.png, TASK-sharpness.png
                 both during training: mean and spread, a panel for each label noise

what is held equal:
  Runs with the same seed start from the same weights and see the same examples, labels and batches
  in the same order, whatever the optimizer. They take turns epoch by epoch in one process, so that
  times compare. Label noise replaces labels of training examples only, by uniformly random ones.
  The learning rate falls to 0 along half a cosine. On the CPU, the same command on the same machine
  gives the same numbers, times apart. Choose settings with --evaluate-on validation (a held-out
  fifth of the training data), not on the test set.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 after a mistake that is explained, 130 after Ctrl-C.

    Args:
        arguments: As typed after ``python -m benchmarks``; None for the process's own.
    """
    try:
        parsed = _parser().parse_args(arguments)
        return COMMANDS[parsed.command].run(parsed)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Train real models with and without sharpness-aware optimizers, and compare.",
        epilog="\n\n".join((_task_list(), _optimizer_list(), _OUTPUT)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
    return parser


def _task_list() -> str:
    return "\n".join(["tasks (--task):", *(_entry(task.name, task.summary) for task in TASKS)])


def _optimizer_list() -> str:
    entries = []
    for case in OPTIMIZERS:
        settings = ", ".join(f"{name}={value:g}" for name, value in case.defaults.items())
        entries.append(_entry(case.name, f"{case.summary}: {settings}"))
    changing = _entry(
        "",
        "change settings with NAME:SETTING=NUMBER, as in sgd,sam,sam:rho=0.2:rho_warmup=0.3; rho_warmup is the "
        "fraction of the steps over which rho rises from 0",
    )
    return "\n".join(["optimizers (--optimizers):", *entries, changing])


def _entry(name: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=f"  {name:<15}", subsequent_indent=" " * 17)
