"""A comparison's file of rows: read, added to and looked up, so that no run is ever made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.rows import Row, append_row, read_rows

__all__ = ["TUNING_SEED", "RunLog", "best_setting"]

TUNING_SEED = 1000
"""Seed of the runs that choose settings; no result is from it."""


class RunLog:
    """The rows of a file.

    Args:
        path: The file; empty or missing for a comparison that has not begun.

    Raises:
        BenchmarkError: If the file holds something else.

    Attributes:
        rows: Every row, oldest first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = read_rows(path) if path.exists() and path.stat().st_size else []

    def add(self, row: Row) -> None:
        """Append a row to the file.

        Args:
            row: A finished run.
        """
        append_row(self._path, row)
        self.rows.append(row)

    def find(self, **wanted: Any) -> Row | None:
        """Return the first row whose attributes are these, or None.

        Args:
            **wanted: Attributes of ``Row`` with their values.
        """
        return next(
            (row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())), None
        )

    def check(
        self, names: str, found: Callable[[Row], tuple[Any, ...]], wanted: Callable[[Row], tuple[Any, ...]]
    ) -> None:
        """Raise unless every row is of the comparison that is asked for.

        Args:
            names: What the two functions return, for the message.
            found: What a row has.
            wanted: What it should have.

        Raises:
            BenchmarkError: If a row has something else.
        """
        for row in self.rows:
            if found(row) != wanted(row):
                raise BenchmarkError(
                    f"{self._path} holds runs with {names} = {found(row)}, and {wanted(row)} is asked for; give "
                    "another --output"
                )


def best_setting(values: Sequence[float], validated: Callable[[float], Row] | None) -> float:
    """Return the value with the best validation accuracy, the first of equals; the middle one where none is validated.

    Args:
        values: What to choose from, smallest first.
        validated: Returns the validation run with a value; None to choose without runs.
    """
    if validated is None:
        return values[len(values) // 2]
    accuracies = {value: validated(value).metrics["accuracy"] for value in values}
    return max(accuracies, key=lambda value: accuracies[value])
