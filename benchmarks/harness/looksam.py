"""LookSAM by hand, with norms over all weights or of each tensor: to find out whether a result is the method's or ours.

Algorithm 1 of Liu et al. 2022, "Towards Efficient and Scalable Sharpness-Aware Minimization". The common
reimplementations take the norms of each tensor by itself, as the paper's layer-wise form does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LookSAM(Optimizer):
    """SAM in every k-th step; the others add the kept part of its gradient that is orthogonal to the gradient.

    Args:
        base: The optimizer that steps.
        model: Unused; given to every optimizer that is compared.
        rho: Radius of the perturbation, in the l2 norm.
        every: The paper's k.
        alpha: Weight of the kept part.
        per_tensor: Whether norms and projections are of each tensor.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | None = None,
        rho: float = 0.1,
        every: float = 5,
        alpha: float = 0.7,
        per_tensor: bool = True,
    ) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.param_groups, self._base = base.param_groups, base
        self._rho, self._every, self._alpha, self._per_tensor = rho, int(every), alpha, per_tensor
        self._steps, self._kept = 0, []

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Take a step and return the loss before it."""
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        first = [p.grad.clone() for p in parameters]
        if self._steps % self._every == 0:
            self._ascend_and_back(parameters, first, closure)
            products = self._dots(first, [p.grad for p in parameters])
            squares = self._dots(first, first)
            pairs = zip(parameters, first, products, squares, strict=True)
            self._kept = [p.grad - dot / (square + 1e-12) * g for p, g, dot, square in pairs]
        else:
            lengths = zip(self._dots(first, first), self._dots(self._kept, self._kept), strict=True)
            for p, kept, (of_gradient, of_kept) in zip(parameters, self._kept, lengths, strict=True):
                p.grad.add_(self._alpha * of_gradient.sqrt() / (of_kept.sqrt() + 1e-12) * kept)
        self._steps += 1
        self._base.step()
        return loss

    def _ascend_and_back(self, parameters: list[Tensor], first: list[Tensor], closure: Callable[[], Tensor]) -> None:
        before = [p.detach().clone() for p in parameters]
        norm = torch.stack([g.square().sum() for g in first]).sum().sqrt()
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.add_(self._rho / (norm + 1e-12) * g)
        closure()
        with torch.no_grad():
            for p, weight in zip(parameters, before, strict=True):
                p.copy_(weight)

    def _dots(self, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
        """Return the dot product of each pair of tensors, or that over all of them for each."""
        each = [(a * b).sum() for a, b in zip(ours, theirs, strict=True)]
        return each if self._per_tensor else [torch.stack(each).sum()] * len(each)
