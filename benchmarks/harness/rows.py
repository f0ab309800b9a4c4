"""What a finished run leaves: one JSON object, one line of a file that is also how an interrupted study resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.harness.errors import BenchmarkError

SCHEMA = 1
T = TypeVar("T")


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
        metrics: At the end, by name, as "accuracy" or "seconds_per_step".
        curves: During training, by name, mostly a value an epoch.
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
    settings: dict[str, Any]
    examples: dict[str, int]
    metrics: dict[str, float]
    curves: dict[str, list[float]]
    warnings: list[str]
    environment: dict[str, str | int]
    timestamp: str
    schema: int = SCHEMA


class Log(Generic[T]):
    """A file of rows, read once and then appended to.

    Args:
        path: The file; it need not exist.
        kind: The rows' dataclass.
        must_exist: Whether an empty or missing file is an error.

    Raises:
        BenchmarkError: If the file holds something else.

    Attributes:
        rows: Every row, oldest first.
    """

    def __init__(self, path: Path, kind: type[T] = Row, *, must_exist: bool = False) -> None:
        self.path = path
        self._kind = kind
        self.rows: list[T] = list(self._read(must_exist))

    def add(self, row: T) -> None:
        """Append a row; the file is complete and closed again afterwards."""
        text = json.dumps(_without_nan(asdict(row)), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.rows.append(row)

    def find(self, **wanted: Any) -> T | None:
        """Return the first row whose attributes are these, or None."""
        return next((row for row in self.rows if all(getattr(row, k) == v for k, v in wanted.items())), None)

    def check(self, names: str, found: Callable[[T], Any], wanted: Callable[[T], Any]) -> None:
        """Raise unless ``found(row) == wanted(row)`` for every row; ``names`` says what the functions return."""
        for row in self.rows:
            if found(row) != wanted(row):
                raise BenchmarkError(
                    f"{self.path} holds runs with {names} = {found(row)}, and {wanted(row)} is asked for; give "
                    "another --output"
                )

    def _read(self, must_exist: bool) -> Iterator[T]:
        if not self.path.exists() and not must_exist:
            return
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{self.path} cannot be read: {error}; give a folder that a study wrote") from error
        complete, _, rest = text.rpartition("\n")
        if rest and not must_exist:  # a process that was killed left half a line
            text = complete + "\n" if complete else ""
            self.path.write_text(text, encoding="utf-8")
        if must_exist and not text.strip():
            raise BenchmarkError(f"{self.path} holds no runs: it is empty")
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                yield from [self._parse(json.loads(line))] if line.strip() else []
            except (ValueError, TypeError, AttributeError) as error:
                raise BenchmarkError(
                    f"line {number} of {self.path} is no {self._kind.__name__.lower()} of this version of the "
                    f"benchmarks: {error}; remove the line, or give another --output"
                ) from error

    def _parse(self, values: Any) -> T:
        names = {field.name for field in fields(self._kind)}
        if not isinstance(values, dict):
            raise ValueError("expected an object")
        if "schema" in names and values.get("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}")
        if "geometry" in names and "metric" in values:  # the name in rows from before 1.0
            values["geometry"] = values.pop("metric")
        if names != values.keys():
            raise ValueError(f"missing or unknown: {', '.join(sorted(names ^ values.keys()))}")
        for key in {"metrics", "curves"} & names:
            values[key] = {name: _with_nan(value) for name, value in values[key].items()}
        return self._kind(**values)


def open_log(folder: Path, name: str = "runs.jsonl", kind: type[T] = Row, *, restart: bool = False) -> Log[T]:
    """Return the log in a study's output folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if restart:
            (folder / name).unlink(missing_ok=True)
        (folder / name).touch()
    except OSError as error:
        raise BenchmarkError(f"--output {folder} cannot be written: {error}; give another folder") from error
    return Log(folder / name, kind)


def _with_nan(value: Any) -> Any:
    """JSON has no nan: null stands for it."""
    return [_with_nan(item) for item in value] if isinstance(value, list) else math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
