"""Tells a user that the perturbation keeps the model at its starting point."""

from __future__ import annotations

import torch
from torch import Tensor

from samopt._callers.cuda_graphs import is_capturing
from samopt._callers.user_warnings import warn_user
from samopt.step_metrics import StepMetrics

__all__ = ["StallDetector"]

_START_STEPS = 5
_CHECKS = (100, 200, 400)


class StallDetector:
    """Warns once when, early in training, the loss stays at its starting level while the perturbation is on.

    A radius that is too large for freshly initialised weights can hold a network at the saddle it starts from. The
    losses stay on their device and are read at steps 100, 200 and 400 only, over the second half of the steps so far.
    Steps without both losses and both gradient norms do not count.
    """

    def __init__(self) -> None:
        self._start: list[Tensor] = []
        self._recent: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._steps = 0
        self._done = False

    def observe(self, metrics: StepMetrics) -> None:
        """Take one step's losses and gradient norms into account.

        Args:
            metrics: The step's.
        """
        rise, norm, perturbed_norm = metrics.sharpness, metrics.grad_norm, metrics.perturbed_grad_norm
        if self._done or metrics.loss is None or rise is None or norm is None or perturbed_norm is None:
            return
        if is_capturing(metrics.loss.device):
            self.dismiss()  # replays never come here
            return
        self._steps += 1
        check = next(check for check in _CHECKS if self._steps <= check)
        loss = metrics.loss.clone()  # a compiled model may write its next loss into the same memory
        if self._steps <= _START_STEPS:
            self._start.append(loss)
        if self._steps > check // 2:
            self._recent.append((loss, rise, norm, perturbed_norm))
        if self._steps == check:
            self._warn_if_held(metrics.radius)
            self._recent = []
            if check == _CHECKS[-1]:
                self.dismiss()

    def dismiss(self) -> None:
        """Watch no longer: the start of training is over."""
        self._done = True
        self._start, self._recent = [], []

    def _warn_if_held(self, radius: Tensor | None) -> None:
        start = float(torch.stack(self._start).double().mean())
        columns = [torch.stack(values).double().cpu() for values in zip(*self._recent, strict=True)]
        losses, (rise, norm, perturbed_norm) = columns[0], [float(values.mean()) for values in columns[1:]]
        now, spread = float(losses.mean()), float(losses.std(correction=0))
        first, second = losses.chunk(2)
        drift = abs(float(second.mean() - first.mean()))
        # A trained model's loss differs by batch, a slow descent drifts, near a minimum the perturbation adds much to
        # the loss, and with an equal gradient the step is the base's own. Comparisons with nan are False.
        is_held = (
            abs(now - start) <= 0.02 * abs(start)
            and spread <= 0.03 * abs(now)
            and float(losses.min()) < float(losses.max())
            and drift < min(spread, 0.005 * abs(now))
            and rise <= 0.5 * abs(now)
            and abs(perturbed_norm - norm) >= 0.1 * norm > 0
        )
        if not is_held:
            return
        steps = self._steps
        self.dismiss()
        size = "" if radius is None else f" of radius {float(radius):g}"
        warn_user(
            f"after {steps} perturbed steps the loss is still at its starting level ({start:.4g} then, {now:.4g} now) "
            f"with a perturbation{size}, which may be holding the model at its starting point. Use a smaller rho, or "
            "let it grow from 0 with samopt.RhoScheduler.linear_warmup(optimizer, steps=...); if the loss stays there "
            "with rho=0 too, the cause is another (the learning rate, the labels). Pass warn_on_stall=False to turn "
            "this warning off"
        )
