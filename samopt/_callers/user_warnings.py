"""Warnings that point at the user's line, however deep inside the library they arise."""

from __future__ import annotations

import sys
import warnings

from samopt.distributed import is_first_rank

__all__ = ["warn_user"]

_INNER = {"contextlib", "samopt", "torch"}


def warn_user(message: str) -> None:
    """Issue a ``UserWarning`` at the closest caller outside samopt, torch and contextlib; among ranks, on the first.

    Args:
        message: What is wrong, what was found, how to fix it.
    """
    if not is_first_rank():
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
