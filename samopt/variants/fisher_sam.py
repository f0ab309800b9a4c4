"""Fisher SAM: a ball in the geometry of the model's outputs (Kim et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.geometry import Fisher
from samopt.variants._options import TAKEN_ELSEWHERE, Options, all_options_shown

__all__ = ["FisherSAM"]


@all_options_shown
class FisherSAM(SharpnessAwareOptimizer):
    """Fisher SAM: a ball in the geometry of the model's output distribution, thin where the loss is steep.

    The base optimizer gets the gradient at ``w + rho T^2 g / ||T g||_2`` with ``T^2 = 1 / (1 + eta g^2)``: the inverse
    of the diagonal empirical Fisher information, with the batch gradient in place of each example's. Source: Kim et al.
    2022, "Fisher SAM: Information Geometry and Sharpness Aware Minimisation", equation 9 and algorithm 1.

    Cost: as ``SAM``. The geometry depends on the scale of the gradient, so a ``GradScaler`` changes it.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation in the Fisher norm, >= 0 (the paper's gamma).
        eta: Weight of the Fisher information against the identity, >= 0, in units of one over the squared gradient.
        **options: ``model``, ``only``, ``reuse_trunk``, ``direction``, ``combination``, ``norm``,
            ``stochastic_rounding``, ``seed``, ``sync_perturbation``, ``backend``, ``measure_grad_norms``,
            ``warn_on_stall`` as for ``SharpnessAwareOptimizer``; with parameters, also the arguments of
            ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, or ``model`` has none of the parameters.

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = samopt.FisherSAM([w], torch.optim.SGD, rho=0.3, eta=1.0, lr=0.1)
        >>> (w * torch.tensor([2.0, 1.0])).sum().backward()
        >>> optimizer.ascend()
        >>> w.data  # T^2 = (1/5, 1/2), so T^2 g = (0.4, 0.5) and ||T g|| = sqrt(1.3)
        tensor([1.1052, 1.1316])
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
        rho: float = 0.1,
        eta: float = 0.1,
        **options: Any,
    ) -> None:
        refuse_fixed(self, options, geometry=TAKEN_ELSEWHERE)
        super().__init__(params, base_optimizer, geometry=Fisher(), rho=rho, eta=eta, **options)
