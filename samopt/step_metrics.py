"""What one step measured, kept on the device until it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["StepMetrics", "as_scalar", "loss_in"]


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of the latest step, as 0-dim tensors on the training device.

    Reading a tensor's value (``float(...)``, ``to_dict()``) is what waits for the device; making them does not. Under a
    ``GradScaler`` both gradient norms are those of the scaled gradients. What was not measured is None.

    Attributes:
        loss: Loss of the first pass, at ``w``.
        perturbed_loss: Loss at ``w + epsilon``; None where no second pass was needed.
        grad_norm: ``||g||_2`` over the perturbed parameters at ``w``.
        perturbed_grad_norm: ``||g||_2`` over the same parameters at ``w + epsilon``.
        radius: Radius asked for, in the geometry's norm; the largest among the groups. 0 where nothing was perturbed.
        applied_radius: Norm of the perturbation really applied, in the geometry's norm: measured after rounding for
            bf16 and fp16 parameters, equal to the radius asked up to rounding for the others.
        distance: Trust-region distance that the radius was made from (``TRAM`` only).

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
        >>> loss = optimizer.backward(lambda: 0.5 * (w * w).sum())
        >>> {name: round(value, 3) for name, value in optimizer.last_step.to_dict().items()}["sharpness"]
        2.625
    """

    loss: Tensor | None = None
    perturbed_loss: Tensor | None = None
    grad_norm: Tensor | None = None
    perturbed_grad_norm: Tensor | None = None
    radius: Tensor | None = None
    applied_radius: Tensor | None = None
    distance: Tensor | None = None

    @property
    def sharpness(self) -> Tensor | None:
        """``perturbed_loss - loss``, the one-step sharpness SAM minimises (Foret et al. 2021, equation 1)."""
        if self.loss is None or self.perturbed_loss is None:
            return None
        return self.perturbed_loss - self.loss

    def to_dict(self) -> dict[str, float]:
        """Return every measured value, and ``sharpness``, as a float; waits for the device."""
        names = [field.name for field in fields(self)]
        names.insert(2, "sharpness")
        return {name: float(value) for name in names if (value := getattr(self, name)) is not None}


def as_scalar(loss: Any) -> Tensor | None:
    """Return the loss inside what a closure returned, detached, or None where none can be found.

    Args:
        loss: A 0-dim (or one-element) tensor, a number, a mapping with the key "loss", an object (a named tuple, say)
            with a ``loss`` attribute, or a tuple or list whose first entry is one of these.
    """
    found = loss_in(loss)
    return None if found is None else found.detach()


def loss_in(loss: Any) -> Tensor | None:
    """Return the loss inside what a closure returned, with its graph, or None where none can be found.

    Args:
        loss: As for ``as_scalar``.
    """
    if isinstance(loss, Tensor):
        return loss.reshape(()) if loss.numel() == 1 else None
    if isinstance(loss, int | float):
        return torch.tensor(float(loss), dtype=torch.float64)
    if isinstance(loss, tuple | list) and not hasattr(loss, "loss"):
        return loss_in(loss[0]) if loss else None
    if isinstance(loss, Mapping):
        return loss_in(loss.get("loss"))
    return loss_in(getattr(loss, "loss", None)) if loss is not None else None
