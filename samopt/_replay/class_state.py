"""State that a module's code keeps outside its objects: attributes of its classes, generators in global variables."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from samopt._replay.code_variables import enclosing_variables, global_names
from samopt._replay.random_state import is_generator

__all__ = ["ClassAttributes", "generators_of_code", "users_classes"]

_CODE = (types.FunctionType, staticmethod, classmethod)
_LIMIT = 100  # functions that are looked at, for each class


class ClassAttributes:
    """The attributes of a class that hold data, with the methods of a dict that putting them back needs.

    A forward may count in ``type(self).count``, or fill a list that every object of the class shares.

    Args:
        kind: A class of modules, or one that it derives from.
    """

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self._names: list[str] = []
        self._size = -1

    def present(self) -> dict[str, Any]:
        """Return the attributes with their values."""
        space = vars(self._kind)
        if len(space) != self._size:
            self._size = len(space)
            self._names = [name for name, value in space.items() if _is_data(name, value)]
        return {name: space[name] for name in self._names}

    def keys(self) -> set[str]:
        """Return the names."""
        return set(self.present())

    def update(self, attributes: dict[str, Any]) -> None:
        """Bind names; those that are bound to the same object are left alone.

        Args:
            attributes: Values by name.
        """
        space = vars(self._kind)
        for name, value in attributes.items():
            if name not in space or space[name] is not value:
                setattr(self._kind, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._kind, name)

    def pop(self, name: str, default: Any) -> Any:
        """Remove a name, if it is there, and return its value.

        Args:
            name: An attribute of the class.
            default: What is returned where it is not there.
        """
        if name not in vars(self._kind):
            return default
        value = vars(self._kind)[name]
        del self[name]
        return value


def users_classes(kinds: Iterable[type]) -> dict[type, None]:
    """Return the classes of some modules, and those that they derive from, without torch's own and Python's.

    Args:
        kinds: Classes of modules.
    """
    return dict.fromkeys(itertools.chain.from_iterable(map(_users_bases, dict.fromkeys(kinds))))


def generators_of_code(kind: type) -> list[Any]:
    """Return the random generators that the methods of a class, and the functions that they call, find by a name.

    Args:
        kind: A class of modules, or one that it derives from.
    """
    found = []
    for space, name in _places(kind):
        value = space.get(name) if isinstance(space, dict) else space.cell_contents
        if is_generator(value):
            found.append(value)
    return found


@functools.lru_cache(maxsize=1024)
def _users_bases(kind: type) -> tuple[type, ...]:
    """Return a class and those that it derives from, without torch's own and Python's."""
    return tuple(each for each in kind.__mro__ if each.__module__.partition(".")[0] not in ("builtins", "torch"))


@functools.lru_cache(maxsize=1024)
def _places(kind: type) -> list[tuple[Any, str]]:
    """Return which variables hold generators: namespaces of modules, or cells, with the name."""
    pending = [value for value in vars(kind).values() if isinstance(value, _CODE)]
    places: list[tuple[Any, str]] = []
    seen = set[int]()
    while pending and len(seen) < _LIMIT:
        function: Any = pending.pop()
        function = getattr(function, "__func__", function)
        if id(function) in seen or not isinstance(function, types.FunctionType):
            continue
        seen.add(id(function))
        if function.__module__ is not None and function.__module__.partition(".")[0] == "torch":
            continue
        space = function.__globals__
        for name in global_names(function.__code__):
            if is_generator(space.get(name)):
                places.append((space, name))
            elif isinstance(space.get(name), types.FunctionType):
                pending.append(space[name])
        for name, cell, value in enclosing_variables(function):
            if is_generator(value):
                places.append((cell, name))
            elif isinstance(value, types.FunctionType):
                pending.append(value)
    return places


def _is_data(name: str, value: Any) -> bool:
    """Return whether an attribute of a class is no method, descriptor, class, or part of Python's own workings."""
    if name.startswith("__") or name == "_abc_impl" or isinstance(value, type | types.ModuleType | nn.Module):
        return False
    return not (hasattr(type(value), "__get__") or isinstance(value, types.GenericAlias | types.UnionType))
