"""What a command line names: functions by ``module:name``, weights by file."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.optional_packages import require

__all__ = ["CommandError", "load_weights", "named_function", "read_state_dict"]

_PREFIXES = ("module.", "_orig_mod.")


class CommandError(Exception):
    """Bad input: what is wrong, what was found, how to put it right; shown without a traceback, exit code 2."""


def named_function(option: str, text: str) -> Callable[..., Any]:
    """Return the function that ``module:name`` names; what the module itself raises passes through.

    Args:
        option: The option it was given to, for messages.
        text: As in "my_package.models:build".

    Raises:
        CommandError: If there is no such module or function.
        ModuleNotFoundError: If a module that it imports is missing.
    """
    module_name, colon, name = text.partition(":")
    if not (colon and module_name and name):
        raise CommandError(f"{option} must be module:function, got {text!r}; write my_module:build_model, for example")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise CommandError(
            f"{option} names the module {module_name!r}, which cannot be found from {Path.cwd()}; run the command from "
            "the folder that holds it, or install it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "no such name" if function is None else type(function).__name__
        raise CommandError(f"{option} must name a function in {module_name!r}, but {name!r} is {found}")
    checked: Callable[..., Any] = function
    return checked


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file, without running anything that it may hold.

    Args:
        path: A safetensors file, or one that ``torch.save`` wrote.
        key: Where in it the state dict is, such as "state_dict"; None for the top.

    Raises:
        CommandError: If there is none.
    """
    if not path.is_file():
        raise CommandError(f"there is no file {str(path)!r} to load weights from")
    content: Any
    if path.suffix == ".safetensors":
        try:
            content = require("safetensors.torch", f"loading {path.name}").load_file(path)
        except ModuleNotFoundError as error:
            raise CommandError(f"{path.name} needs safetensors: python -m pip install safetensors") from error
        except Exception as error:  # its own error class is not exported
            raise CommandError(f"{str(path)!r} is no valid safetensors file: {error}") from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CommandError(
                f"{str(path)!r} holds more than tensors (or is no file that torch.save wrote), and loading it could "
                "run code; save the state dict alone, as in torch.save(model.state_dict(), path), or use safetensors"
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise CommandError(f"{str(path)!r} is no file that torch.save wrote: {error}") from error
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise CommandError(f"{str(path)!r} has no {key!r}; it has {_keys(content)}")
        content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CommandError(
            f"{str(path)!r} holds no state dict at that place, but {_keys(content)}; say where with --key, as in --key "
            "state_dict"
        )
    return {_without_prefix(name): value for name, value in content.items() if isinstance(value, Tensor)}


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Load a state dict into a model, all of it.

    Args:
        model: The model.
        state_dict: The tensors.
        source: Where they are from, for messages.

    Raises:
        CommandError: If they do not fit.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise CommandError(
            f"{source} does not fit {type(model).__name__}: {reasons[:400]}{'...' if len(reasons) > 400 else ''} Check "
            "that --model builds the model that was saved"
        ) from error


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _keys(content: Any) -> str:
    if not isinstance(content, dict):
        return f"an object of type {type(content).__name__}"
    names = [str(name) for name in content]
    return f"the keys {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "nothing"
