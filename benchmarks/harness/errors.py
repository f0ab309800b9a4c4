"""The error that the command line prints without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class BenchmarkError(Exception):
    """What is wrong, what was found, and how to fix it; the command line prints it and exits with code 2."""


def choose(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return ``known[name]``, or raise an error that lists the names and suggests the closest one."""
    if name not in known:
        raise BenchmarkError(f"unknown {kind} {name!r}; {suggestion(name, known)}Known: {', '.join(known)}")
    return known[name]


def suggestion(name: str, known: Mapping[str, T] | list[str]) -> str:
    """Return "did you mean ...? ", or nothing when no name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""
