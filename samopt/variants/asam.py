"""ASAM: adaptive sharpness-aware minimisation (Kwon et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.geometry import Adaptive
from samopt.variants._options import TAKEN_ELSEWHERE, Options, all_options_shown

__all__ = ["ASAM"]


@all_options_shown
class ASAM(SharpnessAwareOptimizer):
    """Adaptive SAM: a ball that does not change when layers are rescaled.

    The base optimizer gets the gradient at ``w + rho T^2 g / ||T g||_2`` with ``T = |w| + eta``; tensors of at most one
    dimension use ``T = 1``. Source: Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", algorithm 1.

    Cost: as ``SAM``; the geometry reads the weights once more.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation in the adaptive norm, >= 0; about ten times SAM's.
        eta: Keeps weights near zero movable, >= 0, in units of the weights.
        **options: ``model``, ``only``, ``reuse_trunk``, ``direction``, ``combination``, ``norm``,
            ``stochastic_rounding``, ``seed``, ``sync_perturbation``, ``backend``, ``measure_grad_norms``,
            ``warn_on_stall`` as for ``SharpnessAwareOptimizer``; with parameters, also the arguments of
            ``base_optimizer``.

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

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        eta: float = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        eta: float = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.5,
        eta: float = 0.01,
        **options: Any,
    ) -> None:
        refuse_fixed(self, options, geometry=TAKEN_ELSEWHERE)
        super().__init__(params, base_optimizer, geometry=Adaptive(), rho=rho, eta=eta, **options)
