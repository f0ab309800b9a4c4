"""What one step measured, kept on the device until somebody reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["ZERO", "Known", "StepMetrics", "as_scalar"]

ZERO: Callable[[], Tensor] = partial(torch.zeros, ())
"""The measurement of what did not happen."""


@dataclass(frozen=True)
class Known:
    """A measurement that is there already.

    Attributes:
        value: 0-dim.
    """

    value: Tensor

    def __call__(self) -> Tensor:
        """Return it."""
        return self.value


@dataclass(frozen=True, repr=False)
class StepMetrics:
    """Measurements of the latest pair of passes, as 0-dim tensors on the training device.

    Reading a tensor's value (``float(...)``, ``to_dict()``) is what waits for the device; making them does not. Under a
    ``GradScaler`` both gradient norms are those of the scaled gradients. What was not measured is None.

    Attributes:
        loss: Loss of the first pass, at ``w``.
        perturbed_loss: Loss of the second pass, at ``w + epsilon``; None where no second pass was needed.
        grad_norm: ``||g||_2`` over the perturbed parameters at ``w``.
        perturbed_grad_norm: ``||g||_2`` over the same parameters at ``w + epsilon``.
        distance: Trust-region distance that the radius was made from (``TRAM`` only).
        asked: Makes ``radius``.
        applied: Makes ``applied_radius``.
    """

    loss: Tensor | None = None
    perturbed_loss: Tensor | None = None
    grad_norm: Tensor | None = None
    perturbed_grad_norm: Tensor | None = None
    distance: Tensor | None = None
    asked: Callable[[], Tensor] | None = None
    applied: Callable[[], Tensor] | None = None

    @property
    def radius(self) -> Tensor | None:
        """Radius asked for, in the metric's norm; the largest among the groups. 0 where nothing was perturbed."""
        return None if self.asked is None else self.asked()

    @property
    def applied_radius(self) -> Tensor | None:
        """Norm of the perturbation really applied, in the metric's norm.

        It is measured after rounding for bf16 and fp16 parameters, equal to the radius asked up to rounding for the
        others. What its parts add up to is worked out when somebody asks.
        """
        return None if self.applied is None else self.applied()

    @property
    def sharpness(self) -> Tensor | None:
        """``perturbed_loss - loss``, the one-step sharpness SAM minimises (Foret et al. 2021, equation 1)."""
        if self.loss is None or self.perturbed_loss is None:
            return None
        return self.perturbed_loss - self.loss

    def to_dict(self) -> dict[str, float]:
        """Return every measured value, the radii and ``sharpness`` too, as a float; waits for the device."""
        return {name: float(value) for name in _NAMES if (value := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in _NAMES)})"

    def __getstate__(self) -> dict[str, Any]:
        made = {"asked": self.radius, "applied": self.applied_radius}
        return vars(self) | {name: None if value is None else Known(value) for name, value in made.items()}


_NAMES = (
    "loss",
    "perturbed_loss",
    "sharpness",
    "grad_norm",
    "perturbed_grad_norm",
    "radius",
    "applied_radius",
    "distance",
)


def as_scalar(loss: Any) -> Tensor | None:
    """Return the loss inside what a closure returned, detached, or None where none can be found.

    Args:
        loss: A 0-dim (or one-element) tensor, a number, a mapping with the key "loss", an object with a ``loss``
            attribute, or a tuple or list whose first entry is one of these.
    """
    if isinstance(loss, Tensor):
        return loss.detach().reshape(()) if loss.numel() == 1 else None
    if isinstance(loss, int | float):
        return torch.tensor(float(loss), dtype=torch.float64)
    if isinstance(loss, tuple | list):
        return as_scalar(loss[0]) if loss else None
    if isinstance(loss, dict):
        return as_scalar(loss.get("loss"))
    return as_scalar(getattr(loss, "loss", None)) if loss is not None else None
