"""Files of dataclasses, a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.errors import BenchmarkError

__all__ = ["as_lines", "read_lines"]

_T = TypeVar("_T")


def as_lines(items: Iterable[Any]) -> str:
    """Return the text of such a file.

    Args:
        items: Dataclass instances.
    """
    return "".join(json.dumps(asdict(item)) + "\n" for item in items)


def read_lines(path: Path, kind: type[_T], what: str, fix: str) -> list[_T]:
    """Return what a file holds; nothing where there is no file.

    Args:
        path: The file.
        kind: The dataclass.
        what: What its instances are called, for the message.
        fix: What to do about a file of something else, likewise.

    Raises:
        BenchmarkError: If it holds something else.
    """
    if not path.exists():
        return []
    try:
        return [kind(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise BenchmarkError(f"{path} holds no {what}: {error}; {fix}") from error
