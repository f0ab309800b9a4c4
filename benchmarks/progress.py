"""Shows how an experiment proceeds: two bars on a terminal, one line for each group of runs everywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.experiment import Experiment, Watcher
from benchmarks.rows import Row
from benchmarks.table import labels_text

__all__ = ["ProgressDisplay"]


class ProgressDisplay(Watcher):
    """The watcher for people; a context manager.

    Args:
        experiment: What will run.
        console: Where to show it; without bars unless it is a terminal.
    """

    def __init__(self, experiment: Experiment, console: Console) -> None:
        self._console = console
        self._epochs = experiment.epochs
        self._runs = len(experiment.choices)
        self._groups = len(experiment.seeds) * len(experiment.label_noise)
        self._finished = 0
        self._where = ""
        self._start = 0.0
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        # Counted in epochs of single runs; what is shown as finished are runs, which end together.
        self._all = self._progress.add_task("all runs", total=self._groups * self._runs * self._epochs)
        self._group = self._progress.add_task("", total=self._runs * self._epochs)

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def group_begins(self, label_noise: float, seed: int) -> None:
        """Start the lower bar anew."""
        self._where = f"seed {seed}, {labels_text(label_noise)}"
        self._start = time.perf_counter()
        self._progress.reset(self._group, description=self._where)

    def epoch_begins(self, optimizer: str, epoch: int) -> None:
        """Name the optimizer and the epoch."""
        self._progress.update(self._all, description=f"epoch {epoch + 1} of {self._epochs}: {optimizer}")

    def epoch_ends(self) -> None:
        """Advance both bars."""
        self._progress.advance(self._all)
        self._progress.advance(self._group)

    def group_ends(self, rows: Sequence[Row]) -> None:
        """Print the accuracies, and any warnings."""
        self._finished += 1
        accuracies = ", ".join(f"{row.optimizer} {100 * row.metrics['accuracy']:.1f}%" for row in rows)
        seconds = time.perf_counter() - self._start
        text = f"[{self._finished}/{self._groups}] {self._where}: {accuracies} ({seconds:.0f} s)"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        for row in rows:
            for warning in row.warnings:
                self._console.print(f"  {row.optimizer} warned: {warning}", markup=False, highlight=False)
