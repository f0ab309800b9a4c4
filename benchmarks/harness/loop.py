"""One training step in the form that samopt documents, for every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def take_step(
    optimizer: Optimizer, compute_loss: Callable[[], Tensor], ascent_loss: Callable[[], Tensor] | None = None
) -> Tensor:
    """Take one step and return the loss before it, at ``w`` (in one pass: where the gradient was taken).

    Args:
        optimizer: A torch optimizer, or a sharpness-aware one.
        compute_loss: Runs the model and returns the loss.
        ascent_loss: The loss of the first pass, where it is of part of the batch.
    """

    def closure(compute: Callable[[], Tensor] = compute_loss) -> Tensor:
        optimizer.zero_grad()
        loss = compute()
        loss.backward()  # torch leaves it unannotated
        return loss

    if ascent_loss is not None:
        loss: Any = optimizer.step(closure, lambda: closure(ascent_loss))
    elif hasattr(optimizer, "backward"):
        optimizer.zero_grad()
        loss = optimizer.backward(compute_loss)
        optimizer.step()
    elif type(optimizer).__module__.startswith("torch.optim"):
        loss = closure()
        optimizer.step()
    else:  # a user's own variant: torch's closure contract
        loss = optimizer.step(closure)
    return torch.as_tensor(loss).detach()
