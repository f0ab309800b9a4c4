"""``report``: tables and figures again, from the file of an earlier run."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.registry import COMMANDS, Command
from benchmarks.results import render
from benchmarks.rows import read_rows

__all__ = ["REPORT"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="files that demo or train wrote")
    parser.add_argument("--output", type=Path, help="folder for table.md and figures (default: the first file's)")


def _run(options: argparse.Namespace) -> int:
    rows = [row for path in options.files for row in read_rows(path)]
    render(rows, options.output or options.files[0].parent, Console())
    return 0


REPORT = COMMANDS.add(
    Command("report", "show and write tables and figures of earlier runs again", _add_arguments, _run)
)
