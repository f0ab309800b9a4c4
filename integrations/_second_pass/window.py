"""The micro-batches of an accumulation window, run again at ``w + epsilon``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from samopt._replay.random_state import RngState
from samopt.optimizer import SharpnessAwareOptimizer

__all__ = ["MicroBatch", "run_again"]


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of the first pass.

    Attributes:
        again: Repeats it, and returns the loss as differentiated.
        loss: That loss in the first pass, detached.
        start: Random state before it.
    """

    again: Callable[[], Tensor]
    loss: Tensor
    start: RngState


def run_again(
    window: Sequence[MicroBatch],
    optimizer: SharpnessAwareOptimizer,
    exchange: Callable[[bool], AbstractContextManager[None]],
    surroundings: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Replace the accumulated gradients of a window by those at ``w + epsilon``.

    Args:
        window: What the present gradients were accumulated from.
        optimizer: Moves and restores the weights; its ``step`` is not called.
        exchange: Given whether this is the window's last micro-batch, returns the context that says whether processes
            exchange its gradients.
        surroundings: Makes a context for all of the second pass.

    Returns:
        Whether there was a second pass.
    """
    with optimizer.perturbed(sum(micro_batch.loss for micro_batch in window)) as second:
        if not second.is_needed:
            return False
        losses = []
        with surroundings():
            for micro_batch in window:
                micro_batch.start.restore()
                with exchange(micro_batch is window[-1]):
                    losses.append(micro_batch.again().detach())
        second.loss = sum(losses)
    return True
