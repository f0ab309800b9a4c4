"""Friendly SAM: along what is special to the batch (Li et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.direction import Friendly
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.variants._options import FIXED_BY_ADAPTIVE, Options, all_options_shown

__all__ = ["FriendlySAM"]


@all_options_shown
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
        adaptive: Use ASAM's geometry.
        **options: ``model``, ``only``, ``reuse_trunk``, ``combination``, ``norm``, ``stochastic_rounding``, ``seed``,
            ``sync_perturbation``, ``backend``, ``measure_grad_norms``, ``warn_on_stall`` as for
            ``SharpnessAwareOptimizer``; with parameters, also the arguments of ``base_optimizer``. Under a
            ``GradScaler`` the average is of scaled gradients, and takes a few steps to follow a change of the scale.

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

    _fixed_options = ("direction",)

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        sigma: float = ...,
        decay: float = ...,
        adaptive: bool = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        sigma: float = ...,
        decay: float = ...,
        adaptive: bool = ...,
        **options: Any,
    ) -> None: ...

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
        refuse_fixed(self, options, direction="use samopt.SAM, which takes it", **FIXED_BY_ADAPTIVE)
        geometry = Adaptive() if adaptive else Euclidean()
        direction = Friendly(sigma, decay)
        super().__init__(params, base_optimizer, geometry=geometry, rho=rho, direction=direction, **options)
