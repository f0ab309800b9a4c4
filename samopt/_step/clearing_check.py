"""Does a closure clear the gradients before it computes new ones?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samopt._perturb.gradients import in_flat_memory

__all__ = ["ClearingCheck"]


class ClearingCheck:
    """Fills one gradient with nan before a closure is called, and looks for nan after.

    Gradients that are there before would be added to those of the first pass. The nan tells, whichever way the closure
    clears: setting to None, or to zero. Where there are no gradients, nothing is done.

    Args:
        parameters: Every parameter of the optimizer.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameter: Tensor | None = None
        dense = [p for p in parameters if p.grad is not None and p.grad.layout is torch.strided and p.numel()]
        if dense:
            self._parameter = min(dense, key=Tensor.numel)
            assert self._parameter.grad is not None
            self._before = self._parameter.grad
            self._values: Tensor | None = None
            if in_flat_memory([self._parameter]).parameters:  # which the closure may clear as a whole
                self._probe, self._values = self._before, self._before.detach().clone()
                self._probe.detach().fill_(torch.nan)
            else:
                self._probe = torch.full_like(self._parameter.grad, torch.nan)
                self._parameter.grad = self._probe

    def verify(self) -> None:
        """Raise if the gradients were not cleared.

        Raises:
            RuntimeError: If they were not.
        """
        if self._parameter is None or self._parameter.grad is not self._probe:
            return
        if not bool(self._probe.isnan().any()):
            return
        if self._values is not None:
            self._before.detach().copy_(self._values)
        self._parameter.grad = self._before
        raise RuntimeError(
            "the closure given to step() did not clear the gradients that were there, so the first pass would add to "
            "them. Begin the closure with optimizer.zero_grad(), and do not call backward before step(closure): the "
            "closure is called for both passes. A loop that has called backward already needs no closure: write 'with "
            "optimizer.perturbed(): criterion(model(x), y).backward()' and 'optimizer.step()'"
        )
