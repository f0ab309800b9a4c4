"""Packages that only some measures need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["require"]


def require(module: str, purpose: str) -> Any:
    """Return a module of the extra ``sharpness``, imported.

    Args:
        module: Its dotted name.
        purpose: What needs it, for the message.

    Raises:
        ModuleNotFoundError: If its package is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs {package}, which is not installed; install it with: python -m pip install "
            '"samopt[sharpness]"',
            name=package,
        ) from error
