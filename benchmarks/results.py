"""The folder of results: runs.jsonl as they finish, then table.md and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.errors import BenchmarkError
from benchmarks.experiment import Experiment, run_experiment
from benchmarks.plot import plot_panels
from benchmarks.progress import ProgressDisplay
from benchmarks.rows import Row, append_row
from benchmarks.summary import panels
from benchmarks.table import markdown, notes, terminal_table

__all__ = ["INTERRUPTED", "render", "run_and_render"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def run_and_render(experiment: Experiment, folder: Path, console: Console, *, overwrite: bool) -> int:
    """Run an experiment, write what it leaves into a folder, show the tables, and return the exit code.

    After Ctrl-C the runs that are finished are written and shown.

    Args:
        experiment: What to run.
        folder: Where to write; made if there is none.
        console: Where to show progress and tables.
        overwrite: Whether to replace an earlier runs.jsonl.

    Raises:
        BenchmarkError: If the folder cannot be written or holds earlier runs, or the experiment is not possible.
    """
    path = folder / "runs.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        size = path.stat().st_size
    except OSError as error:
        raise BenchmarkError(f"--output {folder} cannot be written: {error}; give another folder") from error
    if size and not overwrite:
        raise BenchmarkError(
            f"{path} exists and holds earlier runs; give another --output, or --overwrite to replace them"
        )
    rows: list[Row] = []
    code = 0
    try:
        with ProgressDisplay(experiment, console) as display:
            for row in run_experiment(experiment, display):
                if not rows:  # earlier runs go when there is something to replace them
                    path.write_text("", encoding="utf-8")
                append_row(path, row)
                rows.append(row)
    except KeyboardInterrupt:
        console.print(f"interrupted after {len(rows)} finished runs; an unfinished group is dropped")
        code = INTERRUPTED
    if rows:
        render(rows, folder, console)
        console.print(f"runs: {path}", highlight=False, soft_wrap=True)
    return code


def render(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """Show rows as tables, and write table.md and the figures.

    Args:
        rows: Finished runs.
        folder: Where to write; made if there is none.
        console: Where to show the tables.

    Raises:
        BenchmarkError: If the rows cannot be averaged, or the folder cannot be written.
    """
    found = panels(rows)
    for panel in found:
        console.print()
        console.print(terminal_table(panel))
    console.print()
    for note in notes(found):
        console.print(f"- {note}", markup=False, highlight=False, style="dim")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / "table.md"
        table.write_text(markdown(found), encoding="utf-8")
        figures = plot_panels(found, folder)
    except OSError as error:
        raise BenchmarkError(f"{folder} cannot be written: {error}; give another --output") from error
    console.print()
    for path in (table, *figures):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
