"""WSAM: the loss plus weighted sharpness (Yue et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.combination import WeightedSharpness
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.variants._options import FIXED_BY_ADAPTIVE, Options, all_options_shown

__all__ = ["WSAM"]


@all_options_shown
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
        adaptive: Use ASAM's geometry.
        **options: ``model``, ``only``, ``direction``, ``norm``, ``stochastic_rounding``, ``seed``,
            ``sync_perturbation``, ``backend``, ``measure_grad_norms``, ``warn_on_stall`` as for
            ``SharpnessAwareOptimizer``; with parameters, also the arguments of ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range; with ``decouple``, if the base has no learning rate, or is LBFGS.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = samopt.WSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, gamma=0.9, model=model)
    """

    _fixed_options = ("combination", "reuse_trunk")

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        gamma: float = ...,
        decouple: bool = ...,
        adaptive: bool = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        gamma: float = ...,
        decouple: bool = ...,
        adaptive: bool = ...,
        **options: Any,
    ) -> None: ...

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
        refuse_fixed(
            self,
            options,
            combination="use samopt.SAM, which takes it",
            reuse_trunk="use samopt.SAM, which takes it: this one needs all gradients of both passes",
            **FIXED_BY_ADAPTIVE,
        )
        geometry = Adaptive() if adaptive else Euclidean()
        combination = WeightedSharpness(gamma, decouple)
        super().__init__(params, base_optimizer, geometry=geometry, rho=rho, combination=combination, **options)
