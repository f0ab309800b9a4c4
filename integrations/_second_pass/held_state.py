"""What is reached from the attributes of a trainer or of a module, so that the second pass leaves it alone."""

from __future__ import annotations

import io
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from samopt._callers.user_warnings import warn_user

from .user_objects import behind, is_of_the_user

__all__ = ["held_state"]

_LARGE = 1000  # elements; a longer list holds data, not objects that count
_TOLD: weakref.WeakSet[Any] = weakref.WeakSet()  # owners that were warned of an iterator


def held_state(
    owner: object, values: Iterable[Any], known: Iterable[object] = ()
) -> tuple[list[nn.Module], list[tuple[object, Collection[str]]]]:
    """Return the modules, and the objects of the user's own classes, that are reached from some values.

    It looks into containers, into the attributes of those objects, and behind functions: a method's object, a partial's
    arguments, a closure's variables. Tensors and containers in the attributes of an object belong to it. What an
    iterator has given cannot be taken back, so a warning names the first one that is found.

    Args:
        owner: Whose values these are, a trainer or a module.
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
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            _warn_of_iterator(owner, value)
        elif is_of_the_user(value):
            if hasattr(value, "__dict__"):
                objects.append((value, ()))
                pending.extend(vars(value).values())
        elif brought := behind(value):
            objects.append((types.SimpleNamespace(brought=brought), ()))  # so that containers among it are put back
            pending.extend(brought)
    return modules, objects


def _warn_of_iterator(owner: Any, iterator: Iterator[Any]) -> None:
    """Say once for an owner that a second pass takes other elements from an iterator than the first."""
    if owner in _TOLD:
        return
    _TOLD.add(owner)
    names = [name for name, value in vars(owner).items() if value is iterator]
    place = f"its attribute {names[0]}" if names else "an object or a module in its attributes"
    warn_user(
        f"{type(owner).__name__} holds an iterator ({type(iterator).__name__}) in {place}. If the training step takes "
        "a batch from it, the second pass takes the next one: the two passes see different batches, and half of the "
        "batches are seen by the second pass alone. Let the data loader give this batch too, or take it before the "
        "step: in Lightning, in on_train_batch_start, which keeps it in an attribute. Ignore this warning if the "
        "training step does not use the iterator"
    )
