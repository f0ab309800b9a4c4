"""Momentum-SAM: one pass along the base's momentum (Becker et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.direction import Momentum
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.variants._options import TAKEN_ELSEWHERE, Options, all_options_shown

__all__ = ["MomentumSAM"]


@all_options_shown
class MomentumSAM(SharpnessAwareOptimizer):
    """Momentum-SAM: SAM at the base's price, because the momentum is known before the batch.

    The base gets the gradient at ``w - rho m / ||m||_2``, with ``m`` its own momentum: ahead of its coming step. With
    ``uphill=True`` at ``w + rho m / ||m||_2``. Source: Becker et al. 2024, "Momentum-SAM: Sharpness Aware Minimization
    without Computational Overhead".

    Cost: one forward-backward pass a step in an unchanged loop (with ``model=``), and one copy of the weights, kept
    between steps.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0. None is 0.3 ahead and 0.03 uphill, which trained well in all six settings
            of ``docs/results/frontier`` (5 seeds each): larger radii than 1 ahead, or 0.1 uphill, lost accuracy there.
        adaptive: Use ASAM's geometry.
        uphill: Move against the base's coming step instead of along it.
        preconditioned: Perturb along the step that Adam would take, in place of its momentum.
        **options: ``model``, ``only``, ``norm``, ``stochastic_rounding``, ``seed``,
            ``sync_perturbation``, ``backend``, ``measure_grad_norms``, ``warn_on_stall`` as for
            ``SharpnessAwareOptimizer``; with parameters, also the arguments of ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range; before the second step, if the base keeps no momentum.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = samopt.MomentumSAM(base, rho=0.3, model=model)
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    _fixed_options = (
        "direction",
        "combination",
        "reuse_trunk",
    )

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float | None = ...,
        adaptive: bool = ...,
        uphill: bool = ...,
        preconditioned: bool = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float | None = ...,
        adaptive: bool = ...,
        uphill: bool = ...,
        preconditioned: bool = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float | None = None,
        adaptive: bool = False,
        uphill: bool = False,
        preconditioned: bool = False,
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            direction="use samopt.SAM, which takes it",
            combination="one pass has one gradient, so there is nothing to combine",
            reuse_trunk="one pass runs the trunk once anyway",
            geometry=TAKEN_ELSEWHERE,
            eta='use samopt.ASAM(base, eta=..., direction="momentum")',
        )
        geometry = Adaptive() if adaptive else Euclidean()
        direction = Momentum(uphill=uphill, preconditioned=preconditioned)
        rho = (0.03 if uphill else 0.3) if rho is None else rho
        super().__init__(params, base_optimizer, geometry=geometry, rho=rho, direction=direction, **options)
