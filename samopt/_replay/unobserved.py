"""Whether forward calls belong to a training step, or to a measurement between two steps."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["is_observed", "unobserved"]

_depth = 0


def is_observed() -> bool:
    """Return whether hooks that follow a training step should take forward calls into account."""
    return _depth == 0


@contextmanager
def unobserved() -> Generator[None]:
    """Let forward calls inside this context belong to no pass of any optimizer."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
