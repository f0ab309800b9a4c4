"""The tasks, optimizers and commands there are: each registers once, and everything else looks it up here."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import nn
from torch.optim import Optimizer

from benchmarks.data import Pool
from benchmarks.errors import BenchmarkError

__all__ = ["COMMANDS", "OPTIMIZERS", "TASKS", "Command", "OptimizerCase", "Registry", "Task", "choose"]


class Named(Protocol):
    """Anything that a registry can hold."""

    @property
    def name(self) -> str:
        """What a person types to choose it."""


_T = TypeVar("_T", bound=Named)
_V = TypeVar("_V")


@dataclass(frozen=True)
class Task:
    """Data and a model to train on it.

    Attributes:
        name: What a person types.
        summary: One line for the help.
        classes: Number of classes.
        epochs: Default number of epochs.
        batch_size: Default batch size.
        train_size: Default number of training examples; None for all there are.
        load: Reads the data: called with the ``--data`` argument, or None.
        build_model: Makes a model, initialised from torch's global random stream.
    """

    name: str
    summary: str
    classes: int
    epochs: int
    batch_size: int
    train_size: int | None
    load: Callable[[str | None], Pool]
    build_model: Callable[[], nn.Module]


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer with its default settings.

    Attributes:
        name: What a person types.
        summary: One line for the help.
        base: Name of the optimizer whose cost and accuracy this one is compared with; its own name for a base.
        defaults: Every setting it has, with its default.
        build: Makes the optimizer for a model from all of the settings.
    """

    name: str
    summary: str
    base: str
    defaults: Mapping[str, float]
    build: Callable[[nn.Module, Mapping[str, float]], Optimizer]


@dataclass(frozen=True)
class Command:
    """A subcommand of ``python -m benchmarks``.

    Attributes:
        name: What a person types.
        summary: One line for the help.
        add_arguments: Declares its arguments.
        run: Does it, and returns the exit code.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Registry(Generic[_T]):
    """Named things, in the order in which they were registered.

    Args:
        kind: What they are, for messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._items: dict[str, _T] = {}

    def add(self, item: _T) -> _T:
        """Register something under its name and return it.

        Args:
            item: The thing.

        Raises:
            ValueError: If the name is taken.
        """
        if item.name in self._items:
            raise ValueError(f"{self._kind} {item.name!r} is registered already; give the new one another name")
        self._items[item.name] = item
        return item

    def __getitem__(self, name: str) -> _T:
        return choose(self._kind, name, self._items)

    def __iter__(self) -> Iterator[_T]:
        return iter(self._items.values())

    def names(self) -> list[str]:
        """Return every name."""
        return list(self._items)


def choose(kind: str, name: str, known: Mapping[str, _V]) -> _V:
    """Return ``known[name]``.

    Args:
        kind: What the names are names of, for the message.
        name: What a person typed.
        known: Everything there is.

    Raises:
        BenchmarkError: If there is no such name; says which there are, and which was probably meant.
    """
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise BenchmarkError(f"unknown {kind} {name!r}; {hint}Known: {', '.join(known)}")


TASKS: Registry[Task] = Registry("task")
OPTIMIZERS: Registry[OptimizerCase] = Registry("optimizer")
COMMANDS: Registry[Command] = Registry("command")
