"""What is reached from the attributes of a trainer or of a module, so that the second pass leaves it alone."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .user_objects import behind, is_of_the_user

__all__ = ["held_state"]

_LARGE = 1000  # elements; a longer list holds data, not objects that count


def held_state(
    values: Iterable[Any], known: Iterable[object] = ()
) -> tuple[list[nn.Module], list[tuple[object, Collection[str]]]]:
    """Return the modules, and the objects of the user's own classes, that are reached from some values.

    It looks into containers, into the attributes of those objects, and behind functions: a method's object, a partial's
    arguments, a closure's variables. Tensors and containers in the attributes of an object belong to it.

    Args:
        values: Where to begin.
        known: What is looked after elsewhere.

    Returns:
        The modules, and the objects, each with the names of attributes to leave alone: none.
    """
    modules: list[nn.Module] = []
    objects: list[tuple[object, Collection[str]]] = []
    pending = list(values)
    seen = set(map(id, known))
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, list | tuple | set | dict | deque):
            if len(value) <= _LARGE:
                pending.extend(value.values() if isinstance(value, dict) else value)
        elif is_of_the_user(value):
            if hasattr(value, "__dict__"):
                objects.append((value, ()))
                pending.extend(vars(value).values())
        elif brought := behind(value):
            objects.append((types.SimpleNamespace(brought=brought), ()))  # so that containers among it are put back
            pending.extend(brought)
    return modules, objects
