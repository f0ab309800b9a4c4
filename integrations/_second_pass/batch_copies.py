"""A batch that later changes to the original cannot reach."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections import UserDict, deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .user_objects import attributes_of, is_of_the_user

__all__ = ["independent_copy"]

_VALUES = (type(None), bool, int, float, complex, str, bytes)


def independent_copy(data: Any) -> Any:
    """Return a copy of a batch: containers rebuilt, tensors and arrays cloned, everything else shared.

    A training step may pop "labels", mask its inputs in place or assign to an attribute of the batch; the second pass
    must see them as the first did. What the batch holds twice, its copy holds twice.

    Args:
        data: Nested mappings, lists, tuples, sets, deques and dataclasses of tensors and NumPy arrays, other objects
            with a ``clone`` method, objects of the user's own classes, and any other values. A module is shared.
    """
    return _copy(data, {})


def _copy(data: Any, known: dict[int, Any]) -> Any:
    if isinstance(data, _VALUES) or isinstance(data, nn.Module | type):
        return data
    if id(data) not in known:
        known[id(data)] = data  # an object that holds itself
        known[id(data)] = _copy_of_one(data, known)
    return known[id(data)]


def _copy_of_one(data: Any, known: dict[int, Any]) -> Any:
    if isinstance(data, Tensor) and data.is_leaf and data.requires_grad:
        return data.detach().clone().requires_grad_()  # a leaf as well, whose ``grad`` the step may read
    if callable(getattr(data, "clone", None)):
        return data.clone()
    if isinstance(data, dict | UserDict):
        copied = copy.copy(data)
        for key, value in data.items():
            copied[key] = _copy(value, known)
        return copied
    if isinstance(data, Mapping):
        rebuilt: Any = type(data)
        return rebuilt({key: _copy(value, known) for key, value in data.items()})
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_copy(value, known) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(_copy(value, known) for value in data)
    if isinstance(data, deque):
        return deque((_copy(value, known) for value in data), data.maxlen)
    if isinstance(data, set) or _is_array(data):
        return data.copy()
    if dataclasses.is_dataclass(data) or is_of_the_user(data):
        return _copy_of_object(data, known)
    return data


def _copy_of_object(data: Any, known: dict[int, Any]) -> Any:
    """Return an object of the same class with copies of the attributes; its constructor is not called."""
    kind: Any = type(data)
    if kind is types.SimpleNamespace:
        made: Any = types.SimpleNamespace()
    elif kind.__new__ is object.__new__:
        made = object.__new__(kind)
    else:
        return data
    known[id(data)] = made
    for name, value in attributes_of(data).items():
        object.__setattr__(made, name, _copy(value, known))
    return made


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
