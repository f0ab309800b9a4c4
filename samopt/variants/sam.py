"""The published optimizers: a metric and a radius each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.geometry import Adaptive, Euclidean, Fisher

__all__ = ["ASAM", "SAM", "FisherSAM"]


class SAM(SharpnessAwareOptimizer):
    """Sharpness-aware minimisation around any torch optimizer.

    The base optimizer gets the gradient at ``w + rho g / ||g||_2``. Source: Foret et al. 2021, "Sharpness-Aware
    Minimization for Efficiently Improving Generalization", algorithm 1.

    Cost: two forward-backward passes a step and one transient copy of the weights. ``rho=0`` is the base alone, at its
    cost.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0, in units of the weights' l2 norm.
        adaptive: Use ASAM's metric with its default ``eta``; ``samopt.ASAM`` says it more plainly.
        **options: ``model``, ``norm``, ``stochastic_rounding``, ``seed``, ``sync_perturbation``, ``backend``,
            ``measure_grad_norms``, ``warn_on_stall`` (see ``SharpnessAwareOptimizer``), and the arguments of
            ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, or ``model`` has none of the parameters.

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (w * w).sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        12.5
        >>> w.data  # w - 0.1 * (w + 0.5 * w / 5)
        tensor([2.6700, 3.5600])
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        metric = Adaptive() if adaptive else Euclidean()
        super().__init__(params, base_optimizer, metric=metric, rho=rho, eta=0.01, **options)


class ASAM(SharpnessAwareOptimizer):
    """Adaptive SAM: a ball that does not change when layers are rescaled.

    The base optimizer gets the gradient at ``w + rho T^2 g / ||T g||_2`` with ``T = |w| + eta``; tensors of at most one
    dimension use ``T = 1``. Source: Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", algorithm 1.

    Cost: as ``SAM``; the metric reads the weights once more.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation in the adaptive norm, >= 0; about ten times SAM's.
        eta: Keeps weights near zero movable, >= 0, in units of the weights.
        **options: As for ``SAM``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, or ``model`` has none of the parameters.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = samopt.ASAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
        >>> optimizer.param_groups[0]["rho"]
        0.5
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.5,
        eta: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(params, base_optimizer, metric=Adaptive(), rho=rho, eta=eta, **options)


class FisherSAM(SharpnessAwareOptimizer):
    """Fisher SAM: a ball in the geometry of the model's output distribution, thin where the loss is steep.

    The base optimizer gets the gradient at ``w + rho T^2 g / ||T g||_2`` with ``T^2 = 1 / (1 + eta g^2)``: the inverse
    of the diagonal empirical Fisher information, with the batch gradient in place of each example's. Source: Kim et al.
    2022, "Fisher SAM: Information Geometry and Sharpness Aware Minimisation", equation 9 and algorithm 1.

    Cost: as ``SAM``. The metric depends on the scale of the gradient, so a ``GradScaler`` changes it.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation in the Fisher norm, >= 0 (the paper's gamma).
        eta: Weight of the Fisher information against the identity, >= 0, in units of one over the squared gradient.
        **options: As for ``SAM``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, or ``model`` has none of the parameters.

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = samopt.FisherSAM([w], torch.optim.SGD, rho=0.3, eta=1.0, lr=0.1)
        >>> (w * torch.tensor([2.0, 1.0])).sum().backward()
        >>> optimizer.ascend()
        >>> w.data  # T^2 = (1/5, 1/2), so T^2 g = (0.4, 0.5) and ||T g|| = sqrt(1.3)
        tensor([1.1052, 1.1316])
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.1,
        eta: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(params, base_optimizer, metric=Fisher(), rho=rho, eta=eta, **options)
