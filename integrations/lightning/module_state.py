"""What a LightningModule counts and collects itself, so that the second pass leaves it alone."""

from __future__ import annotations

from collections.abc import Collection

from pytorch_lightning import LightningModule
from torch import nn

from samopt._replay.module_state import every_module

from .._second_pass.held_state import held_state

__all__ = ["module_state"]

_LEFT_ALONE = frozenset(vars(nn.Module()))


def module_state(module: LightningModule) -> tuple[list[nn.Module], list[tuple[object, Collection[str]]]]:
    """Return the modules and the objects that a training step of this module may change.

    The modules are this one and those held by its attributes outside torch's registry (metrics in a plain list, say);
    the objects are those of the user's own classes that are reached from its attributes (a meter, statistics).

    Args:
        module: The module.
    """
    registered = every_module([module])
    users = [each for each in registered if not type(each).__module__.startswith("torch.")]
    values = [value for each in users for name, value in vars(each).items() if name not in _LEFT_ALONE]
    modules, objects = held_state(module, values, known=registered)
    return [module, *modules], objects
