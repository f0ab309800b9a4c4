"""The module inside the wrappers that torch puts around it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["compiled_prefix", "original", "outside_compile"]


def original(model: nn.Module) -> nn.Module:
    """Return the module that DDP and ``torch.compile`` wrap.

    Args:
        model: Any module.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def outside_compile(model: nn.Module) -> nn.Module:
    """Return the module whose hooks see every call eagerly and with the inputs on their device.

    That is the one inside DDP, which moves inputs, and outside ``torch.compile``, which would trace the hooks.

    Args:
        model: The module that the training loop calls.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def compiled_prefix(model: nn.Module) -> str | None:
    """Return what ``torch.compile`` puts before the names of a module's parameters; None if DDP is among the wrappers.

    Args:
        model: A module, compiled or not.
    """
    prefix = ""
    while (inner := _inner(model)) is not None:
        if isinstance(model, DistributedDataParallel):
            return None
        prefix += "_orig_mod."
        model = inner
    return prefix


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, DistributedDataParallel):
        module: nn.Module = model.module
        return module
    compiled = model._modules.get("_orig_mod")
    return compiled if isinstance(compiled, nn.Module) else None
