"""The one error that is shown to the person at the command line without a traceback."""

from __future__ import annotations

__all__ = ["BenchmarkError"]


class BenchmarkError(Exception):
    """What is wrong, what was found, and how to put it right; the command line prints it and exits with code 2."""
