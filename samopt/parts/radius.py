"""How far to move: the radius ``r`` of a perturbation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from samopt._numerics.devices import to_device
from samopt.parts.part import Part

__all__ = ["ConstantRadius", "LossBudget", "Radius", "RadiusValue"]

RadiusValue: TypeAlias = "float | Tensor | Callable[[Tensor], Tensor]"
"""A number; a 0-dim tensor; or a function that makes one of ``||T d||``. Tensors are never read on the host."""


class Radius(Part):
    """How far to move, made from one number per parameter group.

    Attributes:
        option: Name of that number in the parameter groups. 0 there means no perturbation and no second pass.
    """

    option = "rho"

    def prepare(self) -> None:
        """Measure what all groups share; called once at the start of each ascent."""

    def at(self, value: float | Tensor) -> RadiusValue:
        """Return the radius of a group.

        Args:
            value: The group's ``option``, >= 0.
        """
        return value


class ConstantRadius(Radius):
    """``r = rho``: the number in the parameter group (Foret et al. 2021)."""


class LossBudget(Radius):
    """``r = min(budget / ||T d||, max_radius)``: to first order the loss rises by ``budget`` (Wang et al. 2026).

    Args:
        max_radius: Largest radius, > 0, where gradients are small.

    Raises:
        ValueError: If ``max_radius`` is not positive.
    """

    option = "budget"

    def __init__(self, max_radius: float = 0.5) -> None:
        if not max_radius > 0:
            raise ValueError(f"max_radius must be > 0, got {max_radius}; use budget=0 to disable the ascent")
        self.max_radius = max_radius

    def at(self, value: float | Tensor) -> RadiusValue:
        """Return ``value / ||T d||``, at most ``max_radius``, as a function of that norm.

        Args:
            value: The group's budget, in the loss's units.
        """
        return partial(_budgeted, budget=value, largest=self.max_radius)


def _budgeted(norm: Tensor, *, budget: float | Tensor, largest: float) -> Tensor:
    """Return ``budget / norm`` on the device of ``norm``, at most ``largest``."""
    if isinstance(budget, Tensor):
        budget = to_device(budget, norm.device)
    return torch.nan_to_num(budget / norm, nan=0.0, posinf=largest).clamp(max=largest)
