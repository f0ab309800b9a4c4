"""The Hessian as an optimizer sees it: how far a run is from the edge of stability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import MeasuredModel, measuring
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.curvature.eigenvalues import Eigenvalues, Solver, WarmStart
from samopt.sharpness.curvature.operators import Curvature, curvature
from samopt.sharpness.curvature.preconditioner import preconditioner_of

__all__ = ["preconditioned_eigenvalues"]


def preconditioned_eigenvalues(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    optimizer: Any,
    *,
    k: int = 1,
    tolerance: float = 1e-3,
    basis: int | None = None,
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    start: WarmStart | None = None,
    progress: ProgressOption = None,
) -> Eigenvalues:
    """Return the largest eigenvalues of ``P^-1 H`` for the optimizer's present ``P``, and its stability threshold.

    Full-batch training tends to hover where the largest eigenvalue is about ``threshold``: ``2 / lr`` for plain
    gradient descent, ``38 / lr`` for Adam with ``beta1 = 0.9``. With small batches it stays below. SAM's own edge lies
    lower, the more so the larger ``rho`` is beside the gradient (Long & Bartlett 2024). A weight decay in the gradient
    (SGD's) belongs to the Hessian: add it to the eigenvalue. Source: Cohen et al. 2021 and 2022.

    The threshold is ``2 / lr`` for gradient descent, ``2 (1 + beta) / lr`` with momentum, and ``2 (1 + beta1) / ((1
    - beta1) lr)`` for Adam.

    Misleads: with small batches the gradient's noise keeps training below the threshold.

    Cost and memory: as ``hessian_eigenvalues``, and one more copy of the weights.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: As for ``hessian_eigenvalues``; the more of the training set, the closer to the theory.
        optimizer: SGD, Adam, AdamW, RMSprop or Adagrad, after its first step; wrappers are looked into. Learning rates
            that differ between groups are part of ``P``, relative to the first group's.
        k: As for ``hessian_eigenvalues``.
        tolerance: As for ``hessian_eigenvalues``.
        basis: As for ``hessian_eigenvalues``.
        parameters: As for ``hessian_eigenvalues``.
        mode: As for ``hessian_eigenvalues``.
        seed: As for ``hessian_eigenvalues``.
        start: As for ``hessian_eigenvalues``.
        progress: As for ``hessian_eigenvalues``.

    Returns:
        The eigenvalues, with ``threshold`` and the residuals of ``P^-1/2 H P^-1/2``.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
        RuntimeError: If the iteration does not converge, or an operation has no second derivative.
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the optimizer does not fit the model.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (torch.tensor([1.0, 2.0, 3.0]) * model.weight**2).sum() / 2
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> result = sharpness.preconditioned_eigenvalues(model, loss_fn, [None], optimizer)
        >>> round(result.value, 4), result.threshold
        (3.0, 4.0)
    """
    solver = Solver(k, "largest", tolerance, basis, seed, start)
    with measuring(
        model,
        loss_fn,
        batches,
        name="preconditioned eigenvalues",
        parameters=parameters,
        mode=mode,
        progress=progress,
    ) as measured:
        preconditioner = preconditioner_of(optimizer, measured.weights)
        found = solver.solve(_Sandwich(measured, curvature(measured, "hessian"), preconditioner.scales))
        cost = measured.progress.cost
    return Eigenvalues(
        measure="preconditioned_eigenvalues",
        value=found.values[0],
        standard_error=found.standard_error,
        cost=cost,
        settings={**solver.settings, **measured.settings, "lr": preconditioner.lr},
        values=found.values,
        residuals=found.residuals,
        per_batch=found.per_batch,
        threshold=preconditioner.threshold,
    )


class _Sandwich(Curvature):
    """``P^-1/2 H P^-1/2``, symmetric and with the eigenvalues of ``P^-1 H``."""

    def __init__(self, measured: MeasuredModel, inner: Curvature, scales: Sequence[Tensor | float]) -> None:
        self.size, self.device, self.dtype = inner.size, inner.device, inner.dtype
        self._inner = inner
        self._root = torch.cat(
            [
                torch.as_tensor(scale, device=self.device, dtype=self.dtype).expand(weight.shape).reshape(-1)
                for scale, weight in zip(scales, measured.weights, strict=True)
            ]
        ).sqrt_()

    def __call__(self, vector: Tensor, quotients: list[float] | None = None) -> Tensor:
        return self._inner(vector * self._root, quotients).mul_(self._root)

    def standard_error(self, quotients: Sequence[float]) -> float | None:
        return self._inner.standard_error(quotients)
