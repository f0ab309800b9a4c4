"""The micro-batches of an accumulation window, run again at ``w + epsilon``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from samopt._replay.forward_calls import RngState
from samopt._step.second_pass import SecondPass
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
    model: nn.Module,
    exchange: Callable[[bool], AbstractContextManager[None]],
) -> bool:
    """Replace the accumulated gradients of a window by those at ``w + epsilon``.

    Args:
        window: What the present gradients were accumulated from.
        optimizer: Moves and restores the weights; its ``step`` is not called.
        model: The module whose gradients they are.
        exchange: Given whether this is the window's last micro-batch, returns the context that says whether processes
            exchange its gradients.

    Returns:
        Whether there was a second pass.
    """
    with optimizer.perturbed(sum(micro_batch.loss for micro_batch in window)) as second:
        if isinstance(second, SecondPass) and not second.is_needed:
            return False
        model.zero_grad()  # a parameter that the optimizer does not have must not count twice
        losses = []
        for micro_batch in window:
            micro_batch.start.restore()
            with exchange(micro_batch is window[-1]):
                losses.append(micro_batch.again().detach())
        second.loss = sum(losses)
    return True
