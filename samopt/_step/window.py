"""The micro-batches of an accumulation window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from samopt._replay.random_state import RngState

__all__ = ["MicroBatch", "Start"]


@dataclass(frozen=True)
class Start:
    """What the second pass sets before it repeats a micro-batch.

    Attributes:
        random: Random state before the micro-batch.
        change_names: Repeats what the training loop did to attributes since the micro-batch before.
    """

    random: RngState
    change_names: Callable[[], None]

    def repeat(self) -> None:
        """Set it."""
        self.random.restore()
        self.change_names()


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of the first pass.

    Attributes:
        again: Repeats it, and returns the loss as it was differentiated.
        loss: That loss in the first pass, detached.
        start: What to set before.
    """

    again: Callable[[], Tensor]
    loss: Tensor
    start: Start
