"""What a loss function reads from outside itself: batches that a loop rebinds, and random generators."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from samopt._replay.code_variables import ABSENT, enclosing_variables, global_names
from samopt._replay.random_state import is_generator
from samopt._replay.slots import slot_names

__all__ = ["OuterVariables", "WindowVariables", "generators_of"]

_LIMIT = 300  # objects that are looked at; more of them are a data structure
_LONG = 10_000  # entries of a container; a longer one holds data
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter, types.ModuleType, type})
_LEFT_ALONE = (nn.Module, Optimizer, type)  # modules are looked after as modules
_CONTENT = ""  # the one name in a variable of a closure, and in a list


class OuterVariables:
    """The variables of a function, and the attributes and entries of what they hold, as they are now.

    Looked at are variables of enclosing functions, global variables that the code names, default values, arguments of a
    ``functools.partial``, and the object of a bound method; from there dicts, lists, functions and plain objects.

    Args:
        function: What computes the loss.

    Attributes:
        places: What holds names, with what these are bound to, by id.
        tensors: Tensors in variables and containers, with their names and version counters, by id.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.places: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self.tensors: dict[int, tuple[Tensor, str, int]] = {}
        _walk(function, [], self)

    def changed_since(self, before: OuterVariables) -> set[tuple[int, Any]]:
        """Return which names are bound to something else than at an earlier look, as pairs of a place's id and a name.

        Args:
            before: The earlier look.
        """
        found = set()
        for key, (_, names) in self.places.items():
            if key in before.places:
                old = before.places[key][1]
                for name in {**names, **old}:
                    if not _is_same(old.get(name, ABSENT), names.get(name, ABSENT)):
                        found.add((key, name))
        return found

    def refuse_written(self, before: OuterVariables) -> None:
        """Raise if a tensor was written into since an earlier look.

        Args:
            before: The earlier look.

        Raises:
            RuntimeError: If one was.
        """
        for key, (tensor, name, version) in self.tensors.items():
            if key in before.tensors and before.tensors[key][2] != version:
                raise RuntimeError(
                    f"{name!r}, a {tensor.dtype} tensor of shape {tuple(tensor.shape)} that the function given to "
                    "backward() reads, was written in place between two micro-batches of a window, so the second pass "
                    "could not repeat the micro-batch before. Give each micro-batch a tensor of its own: x.clone()"
                )

    def bind(self, names: set[tuple[int, Any]]) -> None:
        """Bind names to what they were bound to.

        Args:
            names: Pairs of a place's id and a name; those of places that were not seen are left alone.
        """
        for key, name in names:
            if key in self.places:
                place, values = self.places[key]
                _put(place, name, values.get(name, ABSENT))


class WindowVariables:
    """The variables that a training loop changes from one micro-batch of a window to the next.

    The second pass calls each micro-batch's function again, when ``x``, ``batch["x"]`` or ``self.x`` hold the last
    batch. What the loop changed between two calls is set to what it was, before each of them, and at the end to what it
    is now. What the functions change themselves is left alone.
    """

    def __init__(self) -> None:
        self._starts: list[OuterVariables] = []
        self._changed: set[tuple[int, Any]] = set()
        self._end: OuterVariables | None = None

    def begin(self, function: Callable[..., Any]) -> int:
        """Look at a function before it is called for the first time.

        Args:
            function: Of the next micro-batch.

        Returns:
            The number of the micro-batch.

        Raises:
            RuntimeError: If the loop wrote into a tensor that the function reads.
        """
        now = OuterVariables(function)
        if self._end is not None:
            now.refuse_written(self._end)
            self._changed |= now.changed_since(self._end)
        self._starts.append(now)
        return len(self._starts) - 1

    def end(self, function: Callable[..., Any]) -> None:
        """Look at a function after it was called.

        Args:
            function: As for ``begin``.
        """
        self._end = OuterVariables(function)

    def set_to(self, number: int) -> None:
        """Bind what the loop changed as it was before a micro-batch.

        Args:
            number: Of the micro-batch.
        """
        if self._changed:
            self._starts[number].bind(self._changed)

    def put_back(self) -> None:
        """Bind what the loop changed as it was after the last micro-batch."""
        if self._changed and self._end is not None:
            self._end.bind(self._changed)


def generators_of(function: Callable[..., Any]) -> list[Any]:
    """Return the random generators that a function reads: torch's, Python's and NumPy's objects, not global streams.

    Args:
        function: What computes the loss.
    """
    found: list[Any] = []
    _walk(function, found, None)
    return found


def _walk(function: Any, generators: list[Any], look: OuterVariables | None) -> None:
    """Gather random generators from a function's variables, and everything else where a look asks for it."""
    pending: list[tuple[Any, str | None]] = [(function, None)]  # with the name of a variable; None for an attribute
    seen = set[int]()
    while pending and len(seen) < _LIMIT:
        value, variable = pending.pop()
        kind = type(value)
        if kind in _ATOMS and (look is None or not isinstance(value, Tensor)):
            continue
        if id(value) in seen or isinstance(value, _LEFT_ALONE):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if look is not None and variable is not None and not value.requires_grad:
                look.tensors[id(value)] = (value, variable, value._version)
        elif kind is types.FunctionType:
            _read_function(value, pending, look)
        elif kind is types.MethodType:
            pending += [(value.__func__, None), (value.__self__, None)]
        elif kind is types.BuiltinMethodType:  # rng.random, say
            pending.append((value.__self__, None))
        elif kind is functools.partial:
            pending += [
                (value.func, None),
                *[(each, "an argument") for each in (*value.args, *value.keywords.values())],
            ]
        elif isinstance(value, dict | list | tuple | deque):
            if len(value) <= _LONG:
                entries = value if isinstance(value, dict) else {_CONTENT: tuple(value)}
                if look is not None and not isinstance(value, tuple):
                    look.places[id(value)] = (value, dict(entries))
                inside = value.items() if isinstance(value, dict) else enumerate(value)
                if len(value) <= _LIMIT:
                    pending += [(each, variable and f"{variable}[{key!r}]") for key, each in inside]
        elif is_generator(value):
            generators.append(value)
        elif kind.__module__.partition(".")[0] not in ("builtins", "torch", "numpy"):
            _read_object(value, pending, look)


def _read_function(function: Any, pending: list[tuple[Any, str | None]], look: OuterVariables | None) -> None:
    """Note the variables that a function reads."""
    for name, cell, value in enclosing_variables(function):
        if value is not ABSENT:
            pending.append((value, name))
        if look is not None:
            look.places[id(cell)] = (cell, {} if value is ABSENT else {_CONTENT: value})
    space = function.__globals__
    names = {name: space[name] for name in global_names(function.__code__) if name in space}
    if look is not None:
        look.places.setdefault(id(space), (space, {}))[1].update(names)
    pending += [(each, name) for name, each in names.items()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    pending += [(each, "a default value") for each in defaults]


def _read_object(value: Any, pending: list[tuple[Any, str | None]], look: OuterVariables | None) -> None:
    """Note the attributes of an object of a user's own."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        pending += [(each, None) for each in attributes.values()]
        if look is not None:
            look.places[id(attributes)] = (attributes, attributes.copy())
    slots = {name: getattr(value, name) for name in slot_names(value) if hasattr(value, name)}
    if slots:
        pending += [(each, None) for each in slots.values()]
        if look is not None:
            look.places[id(value)] = (value, slots)
    if callable(value):
        pending.append((type(value).__call__, None))


def _is_same(old: Any, new: Any) -> bool:
    """Return whether a name is bound to the same object, or a list holds the same ones."""
    if type(old) is tuple and type(new) is tuple:
        return list(map(id, old)) == list(map(id, new))
    return old is new


def _put(place: Any, name: Any, value: Any) -> None:
    """Bind a name in a variable of a closure, a namespace, a dict, a list or an object with slots."""
    if isinstance(place, types.CellType):
        if value is ABSENT:
            del place.cell_contents
        else:
            place.cell_contents = value
    elif isinstance(place, dict):
        if value is ABSENT:
            place.pop(name, None)
        else:
            place[name] = value
    elif isinstance(place, list | deque):
        place.clear()
        place.extend(value)
    elif value is ABSENT:
        delattr(place, name)
    else:
        object.__setattr__(place, name, value)  # frozen dataclasses refuse setattr
