"""A function as it is now, whatever the variables that it reads become."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

__all__ = ["frozen"]

_DEPTH = 3  # functions inside functions


def frozen(function: Callable[..., Any], depth: int = _DEPTH) -> Callable[..., Any]:
    """Return a function that reads its outer variables as they are at this moment.

    ``lambda: criterion(model(x), y)`` looks ``x`` and ``y`` up when it is called. In a window of several micro-batches
    it is called again after the last of them, when both hold another batch.

    Args:
        function: A lambda or function, or a ``functools.partial`` of one. Anything else is returned as it is: an object
            with state of its own is expected to hold its batch.
        depth: How many levels of functions that it reads are frozen too.
    """
    if isinstance(function, functools.partial):
        return functools.partial(frozen(function.func, depth), *function.args, **function.keywords)
    if not isinstance(function, types.FunctionType) or depth == 0:
        return function
    cells = tuple(_copied(cell, depth) for cell in function.__closure__ or ())
    copied = types.FunctionType(
        function.__code__, dict(function.__globals__), function.__name__, function.__defaults__, cells
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _copied(cell: types.CellType, depth: int) -> types.CellType:
    """Return a cell of its own with the same content."""
    try:
        content = cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return cell
    if isinstance(content, types.FunctionType) and content.__closure__:
        content = frozen(content, depth - 1)
    return types.CellType(content)
