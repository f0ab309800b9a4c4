"""How far a measure has got: a bar for a person, a call for a program, and the place to stop either from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from samopt.distributed import is_first_rank
from samopt.sharpness._measuring.optional_packages import require

__all__ = ["Progress", "ProgressOption", "part_of"]

ProgressOption: TypeAlias = bool | Callable[[float, float | None], None] | None
"""None: a bar on a terminal, once a measure has run for two seconds. True or False: always or never. Among several
ranks, the first alone has a bar. A callable: called as ``progress(done, total)`` after every evaluation of the loss, in
gradients of one batch (``total`` is None where it cannot be known); what it raises stops the measure, which puts the
model back first."""

_DELAY = 2.0


class Progress:
    """Counts the cost of one measure and shows it.

    Args:
        option: See ``ProgressOption``.
        name: What is being measured.
        total: Its expected cost in gradients of one batch, or None.

    Attributes:
        cost: What it has cost so far, in gradients of one batch.
    """

    def __init__(self, option: ProgressOption, name: str, total: float | None) -> None:
        self.cost = 0.0
        self._total = total
        self._callback = option if callable(option) else None
        self._bar: Any = None
        if option is False or self._callback is not None or not is_first_rank():
            return
        try:
            tqdm = require("tqdm", "a progress bar").tqdm
        except ModuleNotFoundError:
            if option:
                raise
            return
        self._bar = tqdm(
            total=None if total is None else round(total, 1),
            desc=name,
            unit="gradient",
            bar_format=None if total is None else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            delay=0.0 if option else _DELAY,
            disable=False if option else None,
            leave=False,
        )

    def advance(self, cost: float) -> None:
        """Add to the cost.

        Args:
            cost: In gradients of one batch.
        """
        self.cost += cost
        if self._callback is not None:
            self._callback(self.cost, self._total)
        if self._bar is not None:
            self._bar.update(cost)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def part_of(progress: ProgressOption, before: float, number: int, count: int) -> ProgressOption:
    """Return what follows one of several measurements, so that a function sees their progress as one.

    Args:
        progress: What follows all of them; a bar belongs to one measurement.
        before: What the earlier ones have cost.
        number: Which one this is, from 0.
        count: How many there are.
    """
    if not callable(progress):
        return progress
    report = progress
    return lambda done, total: report(before + done, None if total is None else before + total * (count - number))
