"""What a finished run leaves behind: one JSON object, one line of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError

__all__ = ["SCHEMA", "Row", "append_row", "read_rows"]

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        task: The task's name.
        optimizer: What was asked for, as in "sam" or "sam:rho=0.2".
        base: Name of the optimizer to compare cost and accuracy with.
        seed: Decided everything random.
        label_noise: Fraction of the training labels that were randomised.
        evaluated_on: "test" or "validation".
        settings: Every setting of the optimizer and of the training.
        examples: Numbers of examples: "train", "randomised" among them, "test".
        metrics: At the end: "accuracy", "train_loss", "sharpness"; and "seconds_per_step", the median over all steps,
            with its 20% and 80% quantiles.
        curves: After each epoch, or some of them: "accuracy", "train_loss", "sharpness".
        warnings: Texts of the warnings given during training.
        environment: Commit, versions, device, threads.
        timestamp: When the run ended, UTC.
        schema: Version of this format.
    """

    task: str
    optimizer: str
    base: str
    seed: int
    label_noise: float
    evaluated_on: str
    settings: dict[str, float]
    examples: dict[str, int]
    metrics: dict[str, float]
    curves: dict[str, list[float]]
    warnings: list[str]
    environment: dict[str, str | int]
    timestamp: str
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return one line of strict JSON; numbers that are not finite, which JSON lacks, become null."""
        return json.dumps(_without_nan(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Return the row that ``to_json`` wrote; null in ``metrics`` and ``curves`` becomes nan.

        Args:
            line: One line of a file.

        Raises:
            ValueError: If it is no such line.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            raise ValueError(f"expected an object with schema {SCHEMA}")
        names = {field.name for field in fields(cls)}
        if names != values.keys():
            raise ValueError(f"missing or unknown: {', '.join(sorted(names ^ values.keys()))}")
        values["metrics"] = {name: _number(value) for name, value in values["metrics"].items()}
        values["curves"] = {name: [_number(value) for value in curve] for name, curve in values["curves"].items()}
        return cls(**values)


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file, which is complete and closed again afterwards.

    Args:
        path: The file; made if there is none.
        row: What to add.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(row.to_json() + "\n")


def read_rows(path: Path) -> list[Row]:
    """Return every row of a file.

    Args:
        path: The file.

    Raises:
        BenchmarkError: If it cannot be read, holds no rows, or something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(
            f"{path} cannot be read: {error}; give a runs.jsonl that 'python -m benchmarks train' wrote"
        ) from error
    rows = list(_parse(path, lines))
    if not rows:
        raise BenchmarkError(f"{path} holds no runs: it has {len(lines)} lines, all empty; give a file with some")
    return rows


def _parse(path: Path, lines: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Row.from_json(line)
        except (ValueError, TypeError, AttributeError) as error:
            raise BenchmarkError(
                f"line {number} of {path} is not a run of this version of the benchmarks: {error}; remove the line, "
                "or give a runs.jsonl that 'python -m benchmarks train' wrote"
            ) from error


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value
