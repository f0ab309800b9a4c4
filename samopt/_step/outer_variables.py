"""What a loss function finds outside itself: batches that a loop rebinds, a carried state, generators, modules."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samopt._replay.code_variables import ABSENT, enclosing_variables, global_names
from samopt._replay.random_state import is_generator
from samopt._replay.slots import slot_names
from samopt._replay.tensor_values import memory_of

__all__ = ["OuterVariables", "WindowVariables"]

_LIMIT = 300  # objects that are looked at; more of them are a data structure
_LONG = 10_000  # entries of a container; a longer one holds data
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter, types.ModuleType, type})
_LEFT_ALONE = (Optimizer, type)
# Of these, other threads and the system hold a part: to put back the rest would tear both apart.
_SHARED = frozenset({"asyncio", "concurrent", "logging", "multiprocessing", "queue", "socket", "threading"})
_NOT_READ = frozenset({"builtins", "numpy", "torch"}) | _SHARED
_LISTS = (list, deque)
_CONTENT = ""  # the one name in a variable of a closure, and in a list


class OuterVariables:
    """The variables of a function, and the attributes and entries of what they hold, as they are now.

    Looked at are variables of enclosing functions, global variables that the code names, default values, arguments of a
    ``functools.partial``, and the object of a bound method; from there dicts, lists, functions and plain objects.

    Args:
        function: What computes the loss.

    Attributes:
        places: What holds names, with what these are bound to, by id.
        tensors: Tensors that need no gradient, with their version counters, by id; with their names where they are in
            variables and containers, else None.
        generators: Random generators of torch, Python and NumPy; global streams are none of them.
        modules: Modules, whose attributes are not among the places.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.places: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self.tensors: dict[int, tuple[Tensor, str | None, int]] = {}
        self.generators: list[Any] = []
        self.modules: list[nn.Module] = []
        _walk(function, self)

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

    def written_since(self, before: OuterVariables) -> list[tuple[Tensor, str | None]]:
        """Return the tensors that were written in place since an earlier look, with their names where known.

        Args:
            before: The earlier look.
        """
        known = before.tensors
        return [
            (t, name) for key, (t, name, version) in self.tensors.items() if key in known and known[key][2] != version
        ]

    def refuse_written(self, before: OuterVariables) -> None:
        """Raise if a tensor was written into since an earlier look.

        Args:
            before: The earlier look.

        Raises:
            RuntimeError: If one was.
        """
        for tensor, name in self.written_since(before):
            if name is not None:
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
    """The variables that change from one call of a loss function to the next.

    The second pass calls the function of each micro-batch again. What the training loop changed between two calls, such
    as ``x``, ``batch["x"]`` or ``self.x``, is set before each of them to what it was. What a function binds to a name
    itself, such as a hidden state or a counter, starts again where it started in the first pass. At the end, all of it
    is as the first pass left it.

    Tensors that a function writes in place are as the first pass left them, too. The second pass finds there what the
    first one wrote, as in the buffers of a model, since it would be dear to copy every tensor before. Names that only
    the second pass binds are left alone. So is what a function appends to a list: this is a log most often, which may
    want to see both passes.

    It holds what the variables were bound to, so make a new one for each window.
    """

    def __init__(self) -> None:
        self._starts: list[OuterVariables] = []
        self._by_loop: set[tuple[int, Any]] = set()
        self._by_functions: set[tuple[int, Any]] = set()
        self._end: OuterVariables | None = None
        self._written: dict[int, tuple[Tensor, str | None]] = {}
        self._values: list[tuple[Tensor, Tensor]] = []

    @property
    def written(self) -> list[tuple[Tensor, str | None]]:
        """The tensors that the functions have written in place, with their names where known."""
        return list(self._written.values())

    @property
    def at_start(self) -> OuterVariables:
        """What the function of the latest micro-batch found outside itself before it was called."""
        return self._starts[-1]

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
            self._by_loop |= now.changed_since(self._end)
        self._starts.append(now)
        return len(self._starts) - 1

    def end(self, function: Callable[..., Any]) -> None:
        """Look at a function after it was called.

        Args:
            function: As for ``begin``.
        """
        self._end = OuterVariables(function)
        changed = self._end.changed_since(self._starts[-1])
        self._by_functions |= {each for each in changed if not isinstance(self._end.places[each[0]][0], _LISTS)}
        for tensor, name in self._end.written_since(self._starts[-1]):
            self._written[id(tensor)] = tensor, name

    def leave_alone(self, tensors: Iterable[Tensor]) -> None:
        """Do not put back what the functions wrote into the memory of some tensors: gradients of the second pass.

        Args:
            tensors: Their memory is anywhere in that of a variable.
        """
        memory = {memory_of(tensor) for tensor in tensors}
        self._written = {key: each for key, each in self._written.items() if memory_of(each[0]) not in memory}

    def set_to(self, number: int) -> None:
        """Bind what the loop changed as it was before a micro-batch, and once what the functions changed.

        Args:
            number: Of the micro-batch, from 0.
        """
        if number == 0:
            self._values = [(tensor, tensor.clone()) for tensor, _ in self._written.values()]
        names = self._by_loop
        if self._by_functions:
            seen = {key for start in self._starts[:number] for key in start.places}
            names = names | {(key, name) for key, name in self._by_functions if key not in seen}
        if names:
            self._starts[number].bind(names)

    def put_back(self) -> None:
        """Bind everything that changed as it was after the first pass."""
        names = self._by_loop | self._by_functions
        if names and self._end is not None:
            self._end.bind(names)
        with torch.no_grad():
            for tensor, values in self._values:
                if tensor.shape != values.shape:
                    tensor.data = values
                else:
                    tensor.copy_(values)


def _walk(function: Any, look: OuterVariables) -> None:
    """Gather what a function's variables hold."""
    pending: list[tuple[Any, str | None]] = [(function, None)]  # with the name of a variable; None for an attribute
    seen = set[int]()
    while pending and len(seen) < _LIMIT:
        value, variable = pending.pop()
        kind = type(value)
        if kind in _ATOMS and not isinstance(value, Tensor):
            continue
        if id(value) in seen or isinstance(value, _LEFT_ALONE):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not (value.requires_grad or value.is_inference()):
                look.tensors[id(value)] = (value, variable, value._version)
        elif isinstance(value, nn.Module):
            look.modules.append(value)
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
                if not isinstance(value, tuple):
                    look.places[id(value)] = (value, dict(entries))
                inside = value.items() if isinstance(value, dict) else enumerate(value)
                if len(value) <= _LIMIT:
                    pending += [(each, variable and f"{variable}[{key!r}]") for key, each in inside]
        elif is_generator(value):
            look.generators.append(value)
        elif kind.__module__.partition(".")[0] not in _NOT_READ:
            _read_object(value, pending, look)


def _read_function(function: Any, pending: list[tuple[Any, str | None]], look: OuterVariables) -> None:
    """Note the variables that a function reads."""
    for name, cell, value in enclosing_variables(function):
        if value is not ABSENT:
            pending.append((value, name))
        look.places[id(cell)] = (cell, {} if value is ABSENT else {_CONTENT: value})
    space = function.__globals__
    names = {name: space[name] for name in global_names(function.__code__) if name in space}
    look.places.setdefault(id(space), (space, {}))[1].update(names)
    pending += [(each, name) for name, each in names.items()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    pending += [(each, "a default value") for each in defaults]


def _read_object(value: Any, pending: list[tuple[Any, str | None]], look: OuterVariables) -> None:
    """Note the attributes of an object of a user's own."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        pending += [(each, None) for each in attributes.values()]
        look.places[id(attributes)] = (attributes, attributes.copy())
    slots = {name: getattr(value, name) for name in slot_names(value) if hasattr(value, name)}
    if slots:
        pending += [(each, None) for each in slots.values()]
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
    elif isinstance(place, _LISTS):
        place.clear()
        place.extend(value)
    elif value is ABSENT:
        delattr(place, name)
    else:
        object.__setattr__(place, name, value)  # frozen dataclasses refuse setattr
