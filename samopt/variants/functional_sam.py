"""Functional SAM: SAM's Jacobian with the loss's own derivative (Singh et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.functional import FunctionalGradient
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.variants._options import FIXED_BY_ADAPTIVE, OptionsWithoutModel, all_options_shown

__all__ = ["FunctionalSAM"]


@all_options_shown
class FunctionalSAM(SharpnessAwareOptimizer):
    """Functional SAM: the Jacobian of the outputs at ``w + epsilon``, the loss's derivative at ``w``.

    The base gets ``J(w + epsilon)^T v`` with SAM's ``epsilon = rho g / ||g||``, ``J`` the Jacobian of the model's
    outputs ``f`` and ``v = dL/df`` at ``f(w)``; SAM takes ``v`` at ``f(w + epsilon)``. So the sharpness of the function
    counts, and not that of the loss around its outputs. Source: Singh et al. 2025, "Avoiding spurious sharpness
    minimization broadens applicability of SAM"; Baek et al. 2024, "Why is SAM Robust to Label Noise?", whose Jacobian
    term it is.

    Cost: SAM's, and a copy of the gradient of the outputs, kept from the first pass to the second: of all micro-batches
    where gradients are accumulated.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Radius of the perturbation, >= 0.
        adaptive: Use ASAM's geometry.
        model: The outermost module that the training loop calls; needed. Of a list, the first makes the outputs.
        outputs: Takes from what the model returns the tensors that the loss is computed from: a tensor, or a sequence
            of tensors none of which is computed from another. None finds them: the output itself, ``.logits``, entries
            named so, or every floating-point tensor with a dimension if there is no scalar that may be a loss.
        **options: ``only``, ``direction``, ``norm``, ``stochastic_rounding``, ``seed``, ``sync_perturbation``,
            ``backend``, ``measure_grad_norms``, ``warn_on_stall`` as for ``SharpnessAwareOptimizer``; with parameters,
            also the arguments of ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form, or ``model`` is missing.
        ValueError: If an option is out of range, the direction takes one pass, or the base optimizer updates parameters
            of several modules in ``model``.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(2.0)
        >>> optimizer = samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
        >>> optimizer.backward(lambda: 0.5 * model(torch.ones(1, 1)).square().sum()).item()
        2.0
        >>> model.weight.grad.item()  # the outputs are linear in w, so it is the plain gradient; SAM's is 2.5
        2.0
        >>> optimizer.step()
    """

    _fixed_options = ("combination", "reuse_trunk")

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float = ...,
        adaptive: bool = ...,
        *,
        model: nn.Module | Sequence[nn.Module] | None = ...,
        outputs: Callable[[Any], Tensor | Sequence[Tensor]] | None = ...,
        **options: Unpack[OptionsWithoutModel],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = ...,
        adaptive: bool = ...,
        *,
        model: nn.Module | Sequence[nn.Module] | None = ...,
        outputs: Callable[[Any], Tensor | Sequence[Tensor]] | None = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        outputs: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            combination="use samopt.SAM, which takes it",
            reuse_trunk="use samopt.SAM, which takes it: this one needs the outputs' gradient of a whole first pass",
            **FIXED_BY_ADAPTIVE,
        )
        geometry = Adaptive() if adaptive else Euclidean()
        combination = FunctionalGradient(outputs)
        super().__init__(
            params, base_optimizer, geometry=geometry, rho=rho, combination=combination, model=model, **options
        )
