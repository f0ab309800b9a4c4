"""SAM: sharpness-aware minimisation (Foret et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.variants._options import TAKEN_ELSEWHERE, Options, all_options_shown

__all__ = ["SAM"]


@all_options_shown
class SAM(SharpnessAwareOptimizer):
    """Sharpness-aware minimisation around any torch optimizer.

    The base optimizer gets the gradient at ``w + rho g / ||g||_2``. Source: Foret et al. 2021, "Sharpness-Aware
    Minimization for Efficiently Improving Generalization", algorithm 1.

    Cost: two forward-backward passes a step and one copy of the weights, kept between steps. ``rho=0`` is the base
    alone, at its cost.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0, in units of the weights' l2 norm.
        adaptive: Use ASAM's geometry with its default ``eta``; ``samopt.ASAM`` says it more plainly.
        **options: ``model``, ``only``, ``reuse_trunk``, ``direction``, ``combination``, ``norm``,
            ``stochastic_rounding``, ``seed``, ``sync_perturbation``, ``backend``, ``measure_grad_norms``,
            ``warn_on_stall`` as for ``SharpnessAwareOptimizer``; with parameters, also the arguments of
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

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        adaptive: bool = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        adaptive: bool = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            geometry="use samopt.ASAM, samopt.FisherSAM, or samopt.SharpnessAwareOptimizer, which takes it",
            eta="use samopt.ASAM, which takes it",
            radius=TAKEN_ELSEWHERE,
        )
        geometry = Adaptive() if adaptive else Euclidean()
        super().__init__(params, base_optimizer, geometry=geometry, rho=rho, **options)
