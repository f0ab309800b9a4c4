"""Tells a user that the perturbation keeps the model at its starting point."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from samopt.metrics import StepMetrics

__all__ = ["StallDetector"]

_START_STEPS = 5
_CHECKS = (100, 200, 400)
_SMOOTHING = 0.05
_TOLERANCE = 0.02


class StallDetector:
    """Warns once when, early in training, the loss stays at its starting level while the perturbation is on.

    A radius that is too large for freshly initialised weights can hold a network at the saddle it starts from. The
    losses are averaged on their device and read at steps 100, 200 and 400 only.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._start: Tensor | None = None
        self._recent: Tensor | None = None
        self._done = False

    def observe(self, metrics: StepMetrics) -> None:
        """Take one step's losses into account.

        Args:
            metrics: The step's; ignored without both losses.
        """
        if self._done or metrics.loss is None or metrics.perturbed_loss is None:
            return
        self._steps += 1
        loss = metrics.loss.double() if metrics.loss.device.type != "mps" else metrics.loss
        if self._start is None or self._recent is None:
            self._start, self._recent = loss / _START_STEPS, loss
        elif self._steps <= _START_STEPS:
            self._start = self._start + loss / _START_STEPS
        self._recent = torch.lerp(self._recent, loss, _SMOOTHING)
        if self._steps in _CHECKS:
            self._check(float(self._start), float(self._recent), float(metrics.radius or 0.0))
        self._done = self._done or self._steps >= _CHECKS[-1]

    def _check(self, start: float, recent: float, radius: float) -> None:
        if abs(recent - start) > _TOLERANCE * abs(start):
            return
        self._done = True
        warnings.warn(
            f"after {self._steps} perturbed steps the loss is still at its starting level ({start:.4g} then, "
            f"{recent:.4g} now) with a perturbation of radius {radius:g}: the radius may be holding the model at its "
            "starting point. Use a smaller rho, or start from 0 with samopt.RhoScheduler.linear_warmup(optimizer, "
            "steps=...); pass warn_on_stall=False to turn this warning off",
            stacklevel=4,
        )
