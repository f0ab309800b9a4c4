"""A part of the update that no base optimizer scales: ``w - lr d``, as AdamW decays weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samopt._perturb.gradients import dense_gradients
from samopt._perturb.perturbation import descend
from samopt.parts.combination import inner_product

__all__ = ["DecoupledUpdate", "follow_steps"]


class DecoupledUpdate:
    """What an update subtracts from the weights besides the base's step, just after it.

    A ``GradScaler`` that divides the base's gradients, or a clipping of their norm, scales it alike: the factor is the
    norm of those gradients when they were applied, over their norm when this was made. Gradients that were not finite
    then, which a base may have skipped, move nothing.

    Args:
        parameters: The parameters.
        directions: What to subtract from each, times the learning rate of its group: this rank's part.
        gradients: The base's gradients of all of them, as they are now: this rank's part.
    """

    def __init__(self, parameters: Sequence[Tensor], directions: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self._directions = dict(zip(parameters, directions, strict=True))
        self._square = inner_product(parameters, gradients, gradients)

    def apply(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write ``w - lr d``; under ``maximize=True``, ``w + lr d``.

        Args:
            groups: The base's parameter groups, with the gradients that it has applied.
        """
        present = [parameter for parameter in self._directions if parameter.grad is not None]
        if not present:
            return
        gradients = dense_gradients(present)
        square = inner_product(present, gradients, gradients) / self._square
        factor = torch.where(torch.isfinite(square), square, torch.zeros_like(square)).sqrt()
        for group in groups:
            rate = -group["lr"] if group.get("maximize", False) else group["lr"]
            moving = [p for p in group["params"] if p.grad is not None and p in self._directions]
            descend(moving, [self._directions[parameter] for parameter in moving], rate, factor)


def follow_steps(base: Optimizer, method: Callable[[], None]) -> None:
    """Have a bound method called after every step of a base optimizer, for as long as its object lives.

    Args:
        base: The base optimizer; a copy of it is not followed.
        method: The method.
    """
    reference = weakref.WeakMethod(method)

    def call(*_: object) -> None:
        alive = reference()
        if alive is not None:
            alive()

    handle = base.register_step_post_hook(call)
    weakref.finalize(method.__self__, handle.remove)  # type: ignore[attr-defined]  # a bound method has one
