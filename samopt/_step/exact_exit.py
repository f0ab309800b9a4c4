"""A context whose exit cannot be interrupted before it begins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

__all__ = ["ExactExit"]

_T = TypeVar("_T")


class ExactExit(Generic[_T]):
    """Runs a generator as a context manager, with no Python code between the end of the block and the generator.

    A ``KeyboardInterrupt`` is raised where Python code goes on. In an ``__exit__`` written in Python that can be the
    first instruction, before its ``try``, and the weights would stay perturbed inside the user's own ``except``. Here
    ``__exit__`` is compiled code that resumes the generator, whose ``finally`` is in force from that moment on.

    The generator yields the value of the context, then 0 four times: it is sent 0 when the block is over, and then the
    three arguments of ``__exit__``. What it does at the first of them must be safe to do in any case.

    Args:
        steps: The generator.
    """

    __slots__ = ("__enter__", "__exit__")

    __enter__: Callable[[], _T]
    __exit__: Callable[[Any, Any, Any], Any]

    def __init__(self, steps: Generator[Any, Any, None]) -> None:
        self.__enter__ = steps.__next__
        # max() sends every argument to the generator, 0 first, and returns the 0: no exception is suppressed.
        self.__exit__ = functools.partial(max, 0, key=steps.send)
