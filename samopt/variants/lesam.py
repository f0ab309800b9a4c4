"""Published relatives of SAM that are a choice of parts: direction, metric, radius, combination."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt._perturb.targets import Radius
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.combination import ReusedComponent, SurrogateGap, WeightedSharpness
from samopt.parts.direction import Friendly, Momentum
from samopt.parts.geometry import Adaptive, Euclidean

__all__ = ["GSAM", "LESAM", "WSAM", "FriendlySAM", "LookSAM", "MomentumSAM"]


class MomentumSAM(SharpnessAwareOptimizer):
    """Momentum-SAM: SAM at the base's price, because the momentum is there before the batch.

    The base gets the gradient at ``w + rho m / ||m||_2``, with ``m`` its own momentum, an average of gradients: uphill,
    as SAM goes. Source: Becker et al. 2024, "Momentum-SAM: Sharpness Aware Minimization without Computational
    Overhead"; the authors' code goes the other way, to ``w - rho m / ||m||_2``: that is ``ahead=True``.

    Cost: one forward-backward pass a step in an unchanged loop (with ``model=``), and one transient copy of the
    weights, on a CPU in the memory of the last step's gradients.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0. The authors' scripts take 3, with ``ahead``: more than ten times SAM's.
        adaptive: Use ASAM's metric.
        preconditioned: Ascend along the step that Adam would take, in place of its momentum.
        ahead: Move along the base's coming step instead of against it, as the authors do.
        **options: As for ``samopt.SAM``, without ``direction`` and ``combination``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range; at the first step, if the base keeps no momentum.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = samopt.MomentumSAM(base, rho=0.5, model=model)
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.5,
        adaptive: bool = False,
        preconditioned: bool = False,
        ahead: bool = False,
        **options: Any,
    ) -> None:
        metric = Adaptive() if adaptive else Euclidean()
        direction = Momentum(preconditioned=preconditioned, ahead=ahead)
        super().__init__(params, base_optimizer, metric=metric, rho=rho, eta=0.01, direction=direction, **options)


class FriendlySAM(SharpnessAwareOptimizer):
    """Friendly SAM: the ascent follows what is special to this batch, not the gradient of the whole data.

    The base gets the gradient at ``w + rho d / ||d||_2`` with ``d = g - sigma m`` and ``m`` the running average of
    gradients. Source: Li et al. 2024, "Friendly Sharpness-Aware Minimization", algorithm 1.

    Cost: SAM's, and one more copy of the gradients that is kept and saved.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0.
        sigma: How much of the average is taken out, >= 0. 0 is SAM.
        decay: Weight of the past in the average (the paper's lambda), in [0, 1).
        adaptive: Use ASAM's metric.
        **options: As for ``samopt.SAM``, without ``direction``. Under a ``GradScaler`` the average is of scaled
            gradients, and takes a few steps to follow a change of the scale.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> samopt.FriendlySAM(base, rho=0.2, model=model).param_groups[0]["rho"]
        0.2
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.1,
        sigma: float = 1.0,
        decay: float = 0.9,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        metric = Adaptive() if adaptive else Euclidean()
        direction = Friendly(sigma, decay)
        super().__init__(params, base_optimizer, metric=metric, rho=rho, eta=0.01, direction=direction, **options)


class LookSAM(SharpnessAwareOptimizer):
    """LookSAM: SAM in every k-th step; the others add the part of its gradient that changes slowly.

    In a k-th step the base gets SAM's gradient ``g_s``, and ``g_v``, the part of it orthogonal to ``g``, is kept. In
    the others it gets ``g + alpha ||g|| / ||g_v|| g_v``. Source: Liu et al. 2022, "Towards Efficient and Scalable
    Sharpness-Aware Minimization", algorithm 1.

    Cost: ``1 + 1/every`` times the base's; one copy of the gradients is kept and saved.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0.
        every: The paper's k, >= 1. 1 is SAM.
        alpha: Weight of the kept component, >= 0. 0 is the base in the steps between.
        adaptive: Use ASAM's metric.
        **options: As for ``samopt.SAM``, without ``combination``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> samopt.LookSAM(base, rho=0.1, every=5, model=model).combination.every
        5
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.1,
        every: int = 5,
        alpha: float = 0.7,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        metric = Adaptive() if adaptive else Euclidean()
        rule = ReusedComponent(every, alpha)
        super().__init__(params, base_optimizer, metric=metric, rho=rho, eta=0.01, combination=rule, **options)


class GSAM(SharpnessAwareOptimizer):
    """GSAM: SAM that also closes the surrogate gap, the perturbed loss less the loss.

    The base gets ``g_p - alpha g_v``, with ``g_p`` the gradient at ``w + epsilon`` and ``g_v`` the part of the gradient
    at ``w`` that is orthogonal to it. Source: Zhuang et al. 2022, "Surrogate Gap Minimization Improves Sharpness-Aware
    Training", algorithm 1. The paper also makes ``rho`` follow the learning rate:
    ``samopt.RhoScheduler.proportional_to_lr``.

    Cost: SAM's, and one more transient copy of the gradients.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0.
        alpha: Weight of the gap, >= 0. 0 is SAM.
        adaptive: Use ASAM's metric.
        **options: As for ``samopt.SAM``, without ``combination``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = samopt.GSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, alpha=0.4, model=model)
        >>> scheduler = samopt.RhoScheduler.proportional_to_lr(optimizer, max_lr=0.1)
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        alpha: float = 0.4,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        metric = Adaptive() if adaptive else Euclidean()
        rule = SurrogateGap(alpha)
        super().__init__(params, base_optimizer, metric=metric, rho=rho, eta=0.01, combination=rule, **options)


class WSAM(SharpnessAwareOptimizer):
    """WSAM: the loss plus weighted sharpness, ``L + gamma / (1 - gamma) (L_p - L)``.

    The base gets ``g``; just after its step, ``lr gamma / (1 - gamma) (g_p - g)`` is subtracted from the weights.
    Source: Yue et al. 2023, "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term", its
    definition of the loss and its algorithm.

    Cost: SAM's, two more transient copies of the gradients (one with ``decouple=False``), and two reads of them.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0.
        gamma: Weight of the sharpness, in [0, 1). 0 is the base; 0.5 weighs it as SAM does.
        decouple: Keep the sharpness out of the base optimizer. If False, the base gets
            ``gamma / (1 - gamma) g_p + (1 - 2 gamma) / (1 - gamma) g``, and ``gamma=0.5`` is SAM.
        adaptive: Use ASAM's metric.
        **options: As for ``samopt.SAM``, without ``combination``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range; with ``decouple``, if the base has no learning rate, or is LBFGS.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = samopt.WSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, gamma=0.9, model=model)
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        metric = Adaptive() if adaptive else Euclidean()
        rule = WeightedSharpness(gamma, decouple)
        super().__init__(params, base_optimizer, metric=metric, rho=rho, eta=0.01, combination=rule, **options)


class LESAM(SharpnessAwareOptimizer):
    """Loss-equated SAM: every ascent is meant to raise the loss by the same amount.

    The base gets the gradient at ``w + r g / ||g||_2`` with ``r = min(budget / ||g||, max_radius)``: to first order the
    loss rises by ``budget``. Source: Wang et al. 2026, "Fix the Loss, Not the Radius: Rethinking the Adversarial
    Perturbation of Sharpness-Aware Minimization". The paper lets the budget fall to 0 along a cosine in the last
    epochs: ``samopt.RhoScheduler.cosine``, for the budget is each group's ``rho``.

    Cost: SAM's.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        budget: Rise of the loss, >= 0, in the loss's own units. The default is ours.
        max_radius: Largest radius, > 0, where gradients are small. The default is ours.
        adaptive: Use ASAM's metric, in which the radius and the length of the gradient are measured then.
        **options: As for ``samopt.SAM``, without ``rho`` and ``norm``. The radius depends on the scale of the gradient,
            so a ``GradScaler`` changes it.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range.

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = samopt.LESAM([w], torch.optim.SGD, budget=0.5, max_radius=1.0, lr=0.1)
        >>> (0.5 * w * w).sum().backward()  # the gradient is w, of length 5
        >>> optimizer.ascend()
        >>> w.data  # moved by 0.5 / 5 along (0.6, 0.8)
        tensor([3.0600, 4.0800])
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        budget: float = 0.05,
        max_radius: float = 0.5,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        if not max_radius > 0:
            raise ValueError(f"max_radius must be > 0, got {max_radius}; use budget=0 to disable the ascent")
        if "rho" in options or "norm" in options:
            found = ", ".join(f"{name}={options[name]!r}" for name in ("rho", "norm") if name in options)
            raise TypeError(f"LESAM's radius follows from budget= and max_radius= in the l2 norm, but got {found}")
        self.max_radius = max_radius
        metric = Adaptive() if adaptive else Euclidean()
        super().__init__(params, base_optimizer, metric=metric, rho=budget, eta=0.01, **options)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"max_radius": self.max_radius}

    def radius(self, group: dict[str, Any]) -> Radius:
        """Return ``budget / ||T d||``, at most ``max_radius``, as a function of that norm.

        Args:
            group: One of ``param_groups``.
        """
        return partial(_budgeted, budget=self.option(group, "rho"), largest=self.max_radius)


def _budgeted(norm: Tensor, *, budget: float | Tensor, largest: float) -> Tensor:
    if isinstance(budget, Tensor):
        budget = budget.to(norm.device, non_blocking=True)
    return torch.nan_to_num(budget / norm, nan=0.0, posinf=largest).clamp(max=largest)
