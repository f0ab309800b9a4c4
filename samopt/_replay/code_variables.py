"""Which variables a function's code reads from outside itself."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

__all__ = ["ABSENT", "enclosing_variables", "global_names"]

ABSENT = object()
"""Stands for the value of a variable that has none yet."""


def enclosing_variables(function: Any) -> Iterator[tuple[str, types.CellType, Any]]:
    """Yield the name, the cell and the value of each variable of the enclosing functions that a function uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            value = ABSENT
        yield name, cell, value


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names in some code, and in the functions inside it, that may be global variables."""
    inside = [name for each in code.co_consts if isinstance(each, types.CodeType) for name in global_names(each)]
    return tuple(dict.fromkeys([*code.co_names, *inside]))
