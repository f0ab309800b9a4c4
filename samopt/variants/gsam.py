"""GSAM: SAM that also closes the surrogate gap (Zhuang et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.combination import SurrogateGap
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.variants._options import FIXED_BY_ADAPTIVE, Options, all_options_shown

__all__ = ["GSAM"]


@all_options_shown
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
        adaptive: Use ASAM's geometry.
        **options: ``model``, ``only``, ``direction``, ``norm``, ``stochastic_rounding``, ``seed``,
            ``sync_perturbation``, ``backend``, ``measure_grad_norms``, ``warn_on_stall`` as for
            ``SharpnessAwareOptimizer``; with parameters, also the arguments of ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = samopt.GSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, alpha=0.4, model=model)
        >>> scheduler = samopt.RhoScheduler.proportional_to_lr(optimizer, max_lr=0.1)
    """

    _fixed_options = ("combination", "reuse_trunk")

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        alpha: float = ...,
        adaptive: bool = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        alpha: float = ...,
        adaptive: bool = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        alpha: float = 0.4,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            combination="use samopt.SAM, which takes it",
            reuse_trunk="use samopt.SAM, which takes it: this one needs all gradients of both passes",
            **FIXED_BY_ADAPTIVE,
        )
        geometry = Adaptive() if adaptive else Euclidean()
        combination = SurrogateGap(alpha)
        super().__init__(params, base_optimizer, geometry=geometry, rho=rho, combination=combination, **options)
