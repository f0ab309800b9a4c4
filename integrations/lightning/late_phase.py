"""The last share of a fit, in steps or in time."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from pytorch_lightning import Trainer

from samopt._step.late_phase import first_late_step

__all__ = ["LatePhase"]


class LatePhase:
    """Tells whether the last share of a fit has begun.

    The trainer ends at its last step, or when its ``max_time`` is over, so the share begins with the one that comes to
    it first. Steps and time are those of the trainer and of its timer, which a checkpoint restores. Every process takes
    the time of the first, as with Lightning's timer: otherwise they would not run a second pass together.

    Args:
        trainer: The trainer, at the start of training.
        share: In (0, 1].

    Raises:
        ValueError: If neither the number of steps nor the time is known.
    """

    def __init__(self, trainer: Trainer, share: Fraction) -> None:
        self._trainer = trainer
        self._timers = [timer for timer in trainer.callbacks if _limits_time(timer)]  # type: ignore[attr-defined]
        self._share = float(share)
        total = _steps_of(trainer)
        self._first_step = None if total is None else first_late_step(share, total)
        if self._first_step is None and not self._timers:
            raise ValueError(
                "late= is a share of the run, whose length is not known: the trainer has "
                f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} and no max_time, for "
                f"{trainer.num_training_batches} batches in an epoch; set max_steps= or max_time="
            )
        self._decided_at: int | None = None
        self._has_begun = False

    def has_begun(self) -> bool:
        """Return whether the coming optimizer step is in the share; the same for every batch of that step."""
        step = self._trainer.global_step
        if not self._has_begun and step != self._decided_at:
            self._decided_at = step
            by_step = self._first_step is not None and step >= self._first_step
            self._has_begun = by_step or self._is_late()
        return self._has_begun

    def _is_late(self) -> bool:
        """Return whether the time of the first process says so."""
        if not self._timers:
            return False
        late = False
        for timer in self._timers:
            elapsed, left = timer.time_elapsed("train"), timer.time_remaining("train")
            late = late or left <= self._share * (elapsed + left)
        return bool(self._trainer.strategy.broadcast(late))


def _steps_of(trainer: Any) -> int | None:
    """Return how many optimizer steps a fit has; None where that is not known."""
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        return None
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    factors = [each for each in trainer.callbacks if callable(getattr(each, "get_accumulate_grad_batches", None))]
    if factors and batches < math.inf and epochs > 0:  # Lightning's estimate takes the present factor for every epoch
        total = sum(math.ceil(batches / factors[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
        total = total if trainer.max_steps == -1 else min(total, trainer.max_steps)
    return int(total)


def _limits_time(callback: Any) -> bool:
    """Return whether a callback is a timer of any Lightning package that ends the run."""
    elapsed, left = getattr(callback, "time_elapsed", None), getattr(callback, "time_remaining", None)
    return callable(elapsed) and callable(left) and left("train") is not None
