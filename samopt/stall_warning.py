"""Tells a user that the perturbation keeps the model at its starting point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samopt._callers.cuda_graphs import is_capturing
from samopt._callers.user_warnings import warn_user
from samopt.step_metrics import StepMetrics

__all__ = ["StallDetector"]

_START_STEPS = 5
_CHECKS = (100, 200, 400)
_LEVEL = 0.02  # how far from the start, relative to it, the mean loss may be
_STEADINESS = 0.03  # how much the loss may vary between batches, relative to its mean
_DRIFT = 0.005  # how far the mean may move between the halves of the steps looked at
_LARGEST_RISE = 0.5  # what the perturbation may add to the loss, relative to it: more is a loss close to its minimum
_BEND = 0.1  # by how much the perturbation must change the gradient's norm


class StallDetector:
    """Warns once when, early in training, the loss stays at its starting level while the perturbation is on.

    A radius that is too large for freshly initialised weights can hold a network at the saddle it starts from. A loss
    that stays has other causes too, so more is asked for:

    - the loss is steady, as that of a model which answers everything alike; a trained model's differs by batch;
    - it moves by less between the two halves of the steps than between batches: a slow descent is none of our business;
    - the perturbation adds little to it, which is not so near a minimum;
    - the perturbation changes the gradient's norm, since a step with the same gradient is the base's own.

    The losses stay on their device and are read at steps 100, 200 and 400 only, over the second half of the steps so
    far. Without both losses, or without the gradient norms, there is no warning.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._start: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._others: list[tuple[Tensor, Tensor, Tensor]] = []
        self._done = False

    def observe(self, metrics: StepMetrics) -> None:
        """Take one step's losses and gradient norms into account.

        Args:
            metrics: The step's; ignored unless it has all four.
        """
        rise, norm, perturbed_norm = metrics.sharpness, metrics.grad_norm, metrics.perturbed_grad_norm
        if self._done or metrics.loss is None or rise is None or norm is None or perturbed_norm is None:
            return
        if is_capturing(metrics.loss.device):
            self.dismiss()  # replays never come here
            return
        self._steps += 1
        check = next(check for check in _CHECKS if self._steps <= check)
        if self._steps <= _START_STEPS:
            self._start.append(metrics.loss.clone())  # a compiled model may write its next loss into the same memory
        if self._steps > check // 2:
            self._losses.append(metrics.loss.clone())
            self._others.append((rise, norm, perturbed_norm))
        if self._steps == check:
            self._check(metrics.radius)
            self._losses, self._others = [], []
            if check == _CHECKS[-1]:
                self.dismiss()

    def dismiss(self) -> None:
        """Watch no longer: the start of training is over."""
        self._done = True
        self._start, self._losses, self._others = [], [], []

    def _check(self, radius: Tensor | None) -> None:
        start, losses = _mean(_read(self._start)), _read(self._losses)
        rise, norm, perturbed_norm = (_mean(_read(values)) for values in zip(*self._others, strict=True))
        if not _is_held(start, losses, rise, norm, perturbed_norm):
            return
        steps, now = self._steps, _mean(losses)
        self.dismiss()
        size = "" if radius is None else f" of radius {float(radius):g}"
        warn_user(
            f"after {steps} perturbed steps the loss is still at its starting level ({start:.4g} then, {now:.4g} now) "
            f"with a perturbation{size}, which may be holding the model at its starting point. Use a smaller rho, or "
            "let it grow from 0 with samopt.RhoScheduler.linear_warmup(optimizer, steps=...); if the loss stays there "
            "with rho=0 too, the cause is another (the learning rate, the labels). Pass warn_on_stall=False to turn "
            "this warning off"
        )


def _is_held(start: float, losses: Sequence[float], rise: float, norm: float, perturbed_norm: float) -> bool:
    """Return whether the loss stays at its start and the perturbation may be why; False where anything is nan."""
    level = _mean(losses)
    spread = math.sqrt(_mean([(loss - level) * (loss - level) for loss in losses]))
    half = len(losses) // 2
    drift = abs(_mean(losses[half:]) - _mean(losses[:half]))
    return (
        abs(level - start) <= _LEVEL * abs(start)
        and spread <= _STEADINESS * abs(level)
        and min(losses) < max(losses)  # equal to the last bit means that nothing is trained at all
        and drift < min(spread, _DRIFT * abs(level))
        and rise <= _LARGEST_RISE * abs(level)
        and abs(perturbed_norm - norm) >= _BEND * norm > 0
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # unlike those of the statistics module, also of infinities and nans


def _read(values: Sequence[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack(list(values)).tolist()
    return numbers
