"""Tables for the terminal and in Markdown, figures in one style, and the files that they go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.rows import Row

matplotlib.style.use(Path(__file__).parent / "style.mplstyle")
CONSOLE = Console(highlight=False)
if not CONSOLE.is_terminal:
    CONSOLE.width = 140  # in a file or a log


# SIMPLE_HEAD in ASCII: tools that count bytes, as awk may, find lines as long as they look.
_RULE = box.Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)


@dataclass(frozen=True)
class Table:
    """A table: the first column's entries start at the left, numbers end at the right.

    Attributes:
        title: Printed above it.
        headings: One a column.
        rows: One text a column.
        text_columns: Indices of further columns of text.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = ()

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---" if index in (0, *self.text_columns) else "---:" for index in range(len(self.headings))]
        lines = "\n".join(f"| {' | '.join(line)} |" for line in (self.headings, rule, *self.rows))
        return f"**{self.title}**\n\n{lines}"

    def rich(self) -> RichTable:
        """Return the table for the terminal."""
        table = RichTable(
            title=self.title, title_justify="left", box=_RULE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False
        )
        for index, heading in enumerate(self.headings):
            text = index in (0, *self.text_columns)
            table.add_column(
                heading, overflow="fold", justify="left" if text else "right", min_width=12 if index == 0 else None
            )
        for row in self.rows:
            table.add_row(*row)
        return table


def say(text: str) -> None:
    """Print a line as it is."""
    CONSOLE.print(text, markup=False, soft_wrap=True)


def publish(
    folder: Path,
    tables: Sequence[Table],
    notes: Sequence[str],
    figures: Mapping[str, Figure] | None = None,
    *,
    width: int | None = None,
    conclusion: str = "",
) -> None:
    """Show tables and notes, and write table.md and the figures.

    Args:
        folder: Where to write; it is made.
        tables: Shown and written first.
        notes: How to read them, a line each.
        figures: By file name.
        width: Columns to show all this in; None for the terminal's.
        conclusion: Shown last, and written after the tables.
    """
    for table in tables:
        CONSOLE.print()
        CONSOLE.print(table.rich(), width=width)
    CONSOLE.print()
    for note in notes:
        CONSOLE.print(f"- {note}", markup=False, style="dim", width=width)
    parts = [table.markdown() for table in tables] + [conclusion] * bool(conclusion)
    parts.append("\n".join(f"- {note}" for note in notes))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        for name, drawn in (figures or {}).items():
            drawn.savefig(folder / name)
    except OSError as error:
        raise BenchmarkError(f"{folder} cannot be written: {error}; give another --output") from error
    say(f"wrote {folder / 'table.md'}{''.join(f', {name}' for name in figures or {})}")
    if conclusion:
        CONSOLE.print(f"\n{conclusion}", markup=False, width=width)


def labels_text(label_noise: float) -> str:
    """Return "clean labels" or "40% random labels"."""
    return f"{100 * label_noise:g}% random labels" if label_noise else "clean labels"


def panel_title(row: Row) -> str:
    """Return what the runs of a row's panel have in common."""
    return (
        f"{row.task}, {labels_text(row.label_noise)}: {row.examples['train']} training and {row.examples['test']} "
        f"{row.evaluated_on} examples, {row.settings['epochs']:g} epochs"
    )


def machines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each combination of machine, versions and commit, and one for each warning."""
    environments = {tuple(sorted(row.environment.items())): row.environment for row in rows}
    lines = [
        f"measured on {e['device']}, threads: {e['threads']}, {e['dtype']}, torch {e['torch']}, python {e['python']}, "
        f"samopt {e['samopt']} at commit {e['commit']}"
        for e in environments.values()
    ]
    warned = {
        f"{row.optimizer} on {row.task} with {labels_text(row.label_noise)}, seed {row.seed}, warned: {text}": None
        for row in rows
        for text in row.warnings
    }
    return [*lines, *warned]


def figure(
    rows: int, columns: int, width: float = 4.4, height: float = 4.0, **options: bool | str
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes, an array of that shape; width and height are of one panel, in inches."""
    drawn = Figure(figsize=(1.0 + width * columns, 0.6 + height * rows))
    return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def colour(index: int) -> str:
    """Return a colour of the style's cycle."""
    return f"C{index % 9}"


def band(ax: Axes, places: Sequence[float], curves: Sequence[Sequence[float]], label: str, index: int) -> None:
    """Draw the mean of curves, and a band of one standard deviation."""
    values = np.array(curves, dtype=float)
    mean = values.mean(axis=0)
    style = ("-", "--", "-.")[index // 3 % 3]
    ax.plot(places, mean, color=colour(index), linestyle=style, label=label)
    if len(values) > 1:
        sd = values.std(axis=0, ddof=1)
        ax.fill_between(places, mean - sd, mean + sd, color=colour(index), alpha=0.15, linewidth=0)


def few_ticks(axis: Axis) -> None:
    """Put ticks at 1, 2 and 5 times the powers of ten on a logarithmic axis, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def legend(drawn: Figure) -> None:
    """Put one legend for all panels below them."""
    handles = {label: h for ax in drawn.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        entry = 0.7 + 0.09 * max(map(len, handles))  # inches: the line, the gaps and the longest name
        columns = max(1, min(len(handles), 5, int(drawn.get_figwidth() / entry)))
        drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
