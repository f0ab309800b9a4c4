"""LE-SAM: every ascent is meant to raise the loss by the same amount (Wang et al. 2026)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.parts.radius import LossBudget
from samopt.variants._options import FIXED_BY_ADAPTIVE, Options, all_options_shown

__all__ = ["LESAM"]


@all_options_shown
class LESAM(SharpnessAwareOptimizer):
    """Loss-equated SAM: every ascent is meant to raise the loss by the same amount.

    The base gets the gradient at ``w + r g / ||g||_2`` with ``r = min(budget / ||g||, max_radius)``: to first order the
    loss rises by ``budget``. Source: Wang et al. 2026, "Fix the Loss, Not the Radius: Rethinking the Adversarial
    Perturbation of Sharpness-Aware Minimization". The paper lets the budget fall to 0 along a cosine in the last
    epochs: ``samopt.RhoScheduler.cosine``, which drives each group's ``budget``.

    Cost: SAM's.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        budget: Rise of the loss, >= 0, in the loss's own units. The default is ours.
        max_radius: Largest radius, > 0, where gradients are small. The default is ours.
        adaptive: Use ASAM's geometry, in which the radius and the length of the gradient are measured then.
        **options: ``model``, ``only``, ``reuse_trunk``, ``direction``, ``combination``, ``norm``,
            ``stochastic_rounding``, ``seed``, ``sync_perturbation``, ``backend``, ``measure_grad_norms``,
            ``warn_on_stall`` as for ``SharpnessAwareOptimizer``; with parameters, also the arguments of
            ``base_optimizer``. The radius depends on the scale of the gradient, so a ``GradScaler`` changes it.

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

    _fixed_options = ("norm",)

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        budget: float = ...,
        max_radius: float = ...,
        adaptive: bool = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        budget: float = ...,
        max_radius: float = ...,
        adaptive: bool = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        budget: float = 0.05,
        max_radius: float = 0.5,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            rho="its radius follows from budget= and max_radius=",
            norm="its radius is measured in the l2 norm",
            **FIXED_BY_ADAPTIVE,
        )
        geometry = Adaptive() if adaptive else Euclidean()
        radius = LossBudget(max_radius)
        super().__init__(params, base_optimizer, geometry=geometry, rho=budget, radius=radius, **options)
