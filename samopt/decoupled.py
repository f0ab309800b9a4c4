"""A part of the update that no base optimizer scales: ``w - lr d``, as AdamW decays weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samopt.combination import inner_product
from samopt.gradients import dense_gradients
from samopt.perturbation import descend

__all__ = ["DecoupledUpdate"]


class DecoupledUpdate:
    """What an update subtracts from the weights besides the base's step; it waits for that step.

    A ``GradScaler`` that divides the base's gradients, or a clipping of their norm, scales it alike: the factor is the
    norm of those gradients when they are applied, over their norm when this was made.

    Args:
        parameters: The parameters.
        directions: What to subtract from each, times the learning rate of its group: this rank's part.
        gradients: The base's gradients of all of them, as they are now: this rank's part.
    """

    def __init__(self, parameters: Sequence[Tensor], directions: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._directions = dict(zip(parameters, directions, strict=True))
        self._square = inner_product(parameters, gradients, gradients)

    def apply(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write ``w - lr d``; under ``maximize=True``, ``w + lr d``.

        Args:
            groups: The base's parameter groups, with gradients that are about to be applied.
        """
        present = [parameter for parameter in self._parameters if parameter.grad is not None]
        gradients = dense_gradients(present)
        square = inner_product(present, gradients, gradients)
        factor = torch.where(self._square > 0, square / self._square, torch.zeros_like(square)).sqrt()
        for group in groups:
            rate = -group["lr"] if group.get("maximize", False) else group["lr"]
            moving = [p for p in group["params"] if p.grad is not None and p in self._directions]
            descend(moving, [self._directions[parameter] for parameter in moving], rate, factor)
