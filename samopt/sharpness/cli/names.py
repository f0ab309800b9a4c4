"""Objects by ``module:name``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samopt.sharpness.cli.errors import CommandError

__all__ = ["called", "named_object"]


def named_object(option: str, text: str) -> Any:
    """Return what ``module:name`` names; what the module itself raises passes through.

    Args:
        option: The option it was given to, for messages.
        text: As in "my_package.models:build" or "my_package.models:Classifier".

    Raises:
        CommandError: If there is no such module or name.
        ModuleNotFoundError: If a module that it imports is missing.
    """
    module_name, colon, path = text.partition(":")
    if not (colon and module_name and path):
        raise CommandError(f"{option} must be module:name, got {text!r}; write my_module:build_model, for example")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise CommandError(
            f"{option} names the module {module_name!r}, which cannot be found from {Path.cwd()}; run the command from "
            "the folder that holds it, or install it"
        ) from error
    except (TypeError, ValueError) as error:  # a relative or malformed module name
        raise CommandError(f"{option} names no module: {module_name!r}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise CommandError(f"{option} names {path!r} in {module_name!r}, which has no such name")
        found = getattr(found, name)
    return found


def called(option: str, text: str, function: Any, arguments: Mapping[str, Any]) -> Any:
    """Return what a named class or function returns for arguments.

    Args:
        option: The option it was given to, for messages.
        text: The function's name, as the option gave it.
        function: What is called.
        arguments: Keyword arguments.

    Raises:
        CommandError: If it cannot be called with them.
    """
    if not callable(function):
        raise CommandError(f"{option} {text} must be a class or a function, got {type(function).__name__}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise CommandError(
            f"{option} {text} cannot be called: {error}; give its arguments with {option}_args"
        ) from error
    except ValueError:
        pass  # a built-in without a signature
    return function(**arguments)
