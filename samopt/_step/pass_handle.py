"""What ``optimizer.perturbed()`` yields."""

from __future__ import annotations

from typing import Any

__all__ = ["PassHandle"]


class PassHandle:
    """The second pass, as a user sees it: ``with optimizer.perturbed(loss) as second:``.

    Args:
        is_needed: Whether anything moves.

    Attributes:
        loss: Set it to the loss at ``w + epsilon`` to have it in ``optimizer.last_step``.
        is_needed: False where the pass would repeat the first one, because the gradients at ``w`` are all zero or not
            finite; a loop may leave out its second forward and backward then.

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
        >>> loss = 0.5 * (w * w).sum()
        >>> loss.backward()
        >>> with optimizer.perturbed(loss) as second:
        ...     second.loss = 0.5 * (w * w).sum()
        ...     second.loss.backward()
        >>> optimizer.step()
        >>> round(optimizer.last_step.sharpness.item(), 3)  # 0.5 * 5.5 ** 2 - 0.5 * 5 ** 2
        2.625
    """

    def __init__(self, is_needed: bool) -> None:
        self.loss: Any = None
        self.is_needed = is_needed
