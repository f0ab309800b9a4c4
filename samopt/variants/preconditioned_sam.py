"""Preconditioned SAM: a ball in the geometry of the base optimizer's second moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.geometry import Preconditioned
from samopt.variants._options import TAKEN_ELSEWHERE, Options, all_options_shown

__all__ = ["PreconditionedSAM"]


@all_options_shown
class PreconditionedSAM(SharpnessAwareOptimizer):
    """SAM in the geometry of Adam: the ascent is preconditioned as the descent is.

    The base optimizer gets the gradient at ``w + rho T^2 g / ||T g||_2`` with ``T^2 = 1 / (sqrt(v_hat) + eps)``, where
    ``v_hat`` is the base's own bias-corrected second moment; ``samopt.parts.Preconditioned`` says which one. Adam's
    descent gives each weight a step of about one size, while SAM's ascent along ``g`` moves the few weights with large
    gradients. Here both use one geometry. The equation is SAM's (Foret et al. 2021) in that geometry.

    Cost: as ``SAM``, and two reads of the second moment. The first step, without a second moment, is a plain one.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``. Adam,
            AdamW and their relatives, RMSprop or Adagrad.
        rho: Radius of the perturbation in the norm ``||T^-1 epsilon||_2``, >= 0. Its square has the unit of the loss:
            a loss that is multiplied by 100 needs ten times the radius. Not comparable with SAM's.
        damping: In place of the base group's ``eps``, >= 0, in units of the gradient; None is that ``eps``.
        **options: ``model``, ``only``, ``reuse_trunk``, ``direction``, ``combination``, ``norm``,
            ``stochastic_rounding``, ``seed``, ``sync_perturbation``, ``backend``, ``measure_grad_norms``,
            ``warn_on_stall`` as for ``SharpnessAwareOptimizer``; with parameters, also the arguments of
            ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, ``model`` has none of the parameters, or the base keeps no second
            moment of each parameter (SGD), or a factored one (Adafactor).

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> base = torch.optim.Adam([w], lr=0.0, betas=(0.0, 0.5), eps=0.0)
        >>> optimizer = samopt.PreconditionedSAM(base, rho=0.5)
        >>> slopes = torch.tensor([4.0, 1.0])
        >>> loss = optimizer.backward(lambda: (w * slopes).sum())
        >>> optimizer.step()  # a plain one, which makes v_hat = (16, 1)
        >>> optimizer.zero_grad()
        >>> (w * slopes).sum().backward()
        >>> optimizer.ascend()
        >>> w.data  # T^2 = (1/4, 1), so T^2 g = (1, 1) and ||T g|| = sqrt(5)
        tensor([1.2236, 1.2236])
    """

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        damping: float | None = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        damping: float | None = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.01,
        damping: float | None = None,
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            geometry=TAKEN_ELSEWHERE,
            eta="use damping=, which stands in place of the base's eps",
            radius=TAKEN_ELSEWHERE,
        )
        super().__init__(params, base_optimizer, geometry=Preconditioned(damping), rho=rho, **options)
