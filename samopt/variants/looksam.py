"""LookSAM: a second pass every k steps (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.combination import ReusedComponent
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.variants._options import FIXED_BY_ADAPTIVE, Options, all_options_shown

__all__ = ["LookSAM"]


@all_options_shown
class LookSAM(SharpnessAwareOptimizer):
    """LookSAM: SAM in every k-th step; the others add the part of its gradient that changes slowly.

    In a k-th step the base gets SAM's gradient ``g_s``, and ``g_v``, the part of it orthogonal to ``g``, is kept. In
    the others it gets ``g + alpha ||g|| / ||g_v|| g_v``, tensor by tensor. Source: Liu et al. 2022, "Towards Efficient
    and Scalable Sharpness-Aware Minimization", algorithm 1.

    Cost: ``1 + 1/every`` times the base's; one copy of the gradients is kept and saved.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0.
        every: The paper's k, >= 1. 1 is SAM.
        alpha: Weight of the kept component, >= 0. 0 is the base in the steps between. With 0.7, as in the
            paper, small networks failed in short runs, and gained most where a long run memorises wrong labels.
        per_tensor: Whether norms and orthogonality are those of each tensor, as in the layer-wise form and in the
            common implementations. False takes those over all parameters; a transformer did not learn at all with it.
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
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> samopt.LookSAM(base, rho=0.1, every=5, model=model).combination.every
        5
    """

    _fixed_options = ("combination", "reuse_trunk")

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        every: int = ...,
        alpha: float = ...,
        per_tensor: bool = ...,
        adaptive: bool = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        every: int = ...,
        alpha: float = ...,
        per_tensor: bool = ...,
        adaptive: bool = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.1,
        every: int = 5,
        alpha: float = 0.1,
        per_tensor: bool = True,
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
        combination = ReusedComponent(every, alpha, per_tensor)
        super().__init__(params, base_optimizer, geometry=geometry, rho=rho, combination=combination, **options)
