"""Objects of the user's own classes, told from those of frameworks."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from samopt._replay.slots import slot_names

__all__ = ["attributes_of", "behind", "is_of_the_user"]

_FRAMEWORKS = frozenset(
    {
        "accelerate",
        "datasets",
        "huggingface_hub",
        "lightning",
        "lightning_fabric",
        "numpy",
        "pandas",
        "peft",
        "pyarrow",
        "pytorch_lightning",
        "samopt",
        "sentence_transformers",
        "tokenizers",
        "torch",
        "transformers",
    }
)
"""Packages whose objects keep no count of training steps: data sets, tokenizers, loaders."""


def is_of_the_user(value: Any) -> bool:
    """Return whether an object is of a class that the user, or a package built on a framework, wrote.

    Args:
        value: What an attribute holds.
    """
    if isinstance(value, type) or not (hasattr(value, "__dict__") or slot_names(value)):
        return False
    if callable(value) and type(value).__module__ in ("builtins", "types", "functools"):  # a function, not an object
        return False
    for kind in type(value).__mro__[:-1]:
        package = kind.__module__.partition(".")[0]
        if package in _FRAMEWORKS or (package in sys.stdlib_module_names and package not in ("types", "typing")):
            return False
    return True


def attributes_of(value: Any) -> dict[str, Any]:
    """Return what an object's names are bound to, in its ``__dict__`` and in its slots.

    Args:
        value: The object, with or without a ``__dict__``.
    """
    in_slots = {name: getattr(value, name) for name in slot_names(value) if hasattr(value, name)}
    return in_slots | getattr(value, "__dict__", {})


def behind(function: Any) -> list[Any]:
    """Return what a function brings along: a method's object, a partial's arguments, a closure's variables.

    Args:
        function: A function, method or ``functools.partial``; anything else brings nothing.
    """
    if isinstance(function, types.MethodType):
        return [function.__self__, function.__func__]
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, types.FunctionType):
        return [content for cell in function.__closure__ or () for content in _content(cell)]
    return []


def _content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a variable that has no value yet
        return []
