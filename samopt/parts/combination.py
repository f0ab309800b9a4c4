"""Which gradient the base optimizer gets, of the one at ``w`` and the one at ``w + epsilon``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samopt._numerics.devices import to_device
from samopt.distributed import Shards
from samopt.parts.checkpoint import by_parameter, in_order
from samopt.parts.checks import check_nonnegative
from samopt.parts.part import Part

__all__ = [
    "Combination",
    "ReusedComponent",
    "SurrogateGap",
    "WeightedSharpness",
    "inner_product",
]


class Combination(Part):
    """Which gradient the base optimizer gets, of the one at ``w`` and the one at ``w + epsilon``.

    ``combine`` is called with the gradients of every parameter that has both (this rank's part of them, where they are
    sharded), and writes its answer into the second ones. Every rank must compute the same answer, so the first
    gradients are averaged over ranks as the second ones are.

    Attributes:
        uses_first_gradients: Whether the rule reads the gradients at ``w``. Where it does not, they are free for the
            second pass, and stay on their rank; ``combine`` and ``complete`` are not called.
    """

    uses_first_gradients = True

    def is_due(self) -> bool:
        """Return whether this step has a second pass; the answer must not change before ``advance``."""
        return True

    def combine(self, parameters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Write the base's gradient into ``second``.

        Args:
            parameters: The parameters.
            first: Their gradients at ``w``.
            second: Their gradients at ``w + epsilon``.
        """
        raise NotImplementedError

    def decoupled_update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor] | None:
        """Return what is subtracted from the weights after the base's step; called before ``combine``.

        Args:
            first: The gradients at ``w``.
            second: Those at ``w + epsilon``.

        Returns:
            A tensor for each, to be multiplied by the learning rate; None for nothing.
        """
        return None

    def complete(self, parameters: Sequence[Tensor], first: Sequence[Tensor]) -> None:
        """Write the base's gradient into ``first``, in a step without a second pass.

        Args:
            parameters: The parameters.
            first: Their gradients at ``w``.
        """


class SurrogateGap(Combination):
    """``g_p - alpha g_v``, with ``g_v`` the part of ``g`` that is orthogonal to ``g_p``.

    It descends on the perturbed loss, and on the gap between that and the loss where the two do not conflict. Source:
    Zhuang et al. 2022, "Surrogate Gap Minimization Improves Sharpness-Aware Training", algorithm 1.

    Args:
        alpha: Weight of the gap, >= 0. 0 is SAM.

    Raises:
        ValueError: If ``alpha`` is negative.
    """

    def __init__(self, alpha: float = 0.4) -> None:
        check_nonnegative("alpha", alpha)
        self.alpha = alpha

    def combine(self, parameters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Write ``(1 + alpha c) g_p - alpha g`` into ``second``, with ``c = <g, g_p> / ||g_p||^2``."""
        share = _ratio(inner_product(parameters, first, second), inner_product(parameters, second, second))
        for gradient, plain in zip(second, first, strict=True):
            gradient.mul_((1 + self.alpha * share).to(gradient)).sub_(plain, alpha=self.alpha)


class WeightedSharpness(Combination):
    """The loss plus weighted sharpness, whose gradient is ``g + gamma / (1 - gamma) (g_p - g)``.

    Source: Yue et al. 2023, "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term": its
    definition of the loss, and its algorithm, which keeps the sharpness out of the base optimizer's momenta and scales.

    Args:
        gamma: In [0, 1). 0 is the base optimizer; above 0.5 sharpness weighs more than in SAM.
        decouple: The base gets ``g``, and ``lr gamma / (1 - gamma) (g_p - g)`` is subtracted from the weights just
            after its step. If False, the base gets the sum; 0.5 is SAM then.

    Raises:
        ValueError: If ``gamma`` is out of range.
    """

    def __init__(self, gamma: float = 0.9, decouple: bool = True) -> None:
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}; 0.5 weighs the sharpness as SAM does")
        self.gamma = gamma
        self.decouple = decouple

    def check(self, base: Optimizer) -> None:
        """Raise if a base optimizer cannot be used with it.

        Args:
            base: The base optimizer.

        Raises:
            ValueError: If the sharpness is decoupled, and the base has no learning rate for one update a step.
        """
        if not self.decouple:
            return
        name = type(base).__name__
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError(
                f"decouple=True subtracts the sharpness once a step, and {name} evaluates several points a step; use "
                "decouple=False"
            )
        if any("lr" not in group for group in base.param_groups):
            raise ValueError(
                f"decouple=True subtracts lr times the sharpness, and a parameter group of {name} has no 'lr'; use "
                "decouple=False"
            )

    def decoupled_update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor] | None:
        """Return ``gamma / (1 - gamma) (g_p - g)`` where that is decoupled."""
        if not self.decouple:
            return None
        weight = self.gamma / (1 - self.gamma)
        return [(gradient - plain).mul_(weight) for gradient, plain in zip(second, first, strict=True)]

    def combine(self, parameters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Write ``gamma / (1 - gamma) g_p + (1 - 2 gamma) / (1 - gamma) g`` into ``second``; decoupled, ``g``."""
        if self.decouple:
            for gradient, plain in zip(second, first, strict=True):
                gradient.mul_(0).add_(plain)  # what is not finite stays to be seen, by a GradScaler above all
            return
        rest = 1 - self.gamma
        for gradient, plain in zip(second, first, strict=True):
            gradient.mul_(self.gamma / rest).add_(plain, alpha=(1 - 2 * self.gamma) / rest)


class ReusedComponent(Combination):
    """SAM in every k-th step; in the others ``g + alpha ||g|| / ||g_v|| g_v``, in one pass.

    ``g_v`` is the part of the latest ``g_p`` that was orthogonal to its ``g``: it changes slowly. Source: Liu et al.
    2022, "Towards Efficient and Scalable Sharpness-Aware Minimization" (LookSAM), algorithm 1.

    Cost: ``1 + 1/every`` times the base's; one copy of the gradients is kept, and saved in checkpoints. With sharded
    parameters and ``per_tensor``, ranks exchange two numbers for each tensor.

    Args:
        every: Steps from one second pass to the next, >= 1.
        alpha: Weight of the reused component, >= 0. The paper's is 0.7; see ``samopt.LookSAM``.
        per_tensor: Whether norms and inner products are those of each tensor, as in the layer-wise form and in the
            common implementations; otherwise those over all parameters.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, every: int = 5, alpha: float = 0.1, per_tensor: bool = True) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        check_nonnegative("alpha", alpha)
        self.every = every
        self.alpha = alpha
        self.per_tensor = per_tensor
        self._steps = 0
        self._component: dict[Tensor, Tensor] = {}

    def is_due(self) -> bool:
        """Return whether this is a k-th step."""
        return self._steps % self.every == 0

    def combine(self, parameters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Keep ``g_p - <g_p, g> / ||g||^2 g``; ``g_p`` itself is the base's gradient."""
        products = self._products(parameters, first, second), self._products(parameters, first, first)
        shares = map(_ratio, *products)
        self._component = {
            parameter: gradient - share.to(plain) * plain
            for parameter, plain, gradient, share in zip(parameters, first, second, shares, strict=True)
        }

    def complete(self, parameters: Sequence[Tensor], first: Sequence[Tensor]) -> None:
        """Add ``alpha ||g|| / ||g_v|| g_v`` to ``first``."""
        known = [(p, g, self._component[p]) for p, g in zip(parameters, first, strict=True) if p in self._component]
        if not known:
            return
        owners, gradients, components = zip(*known, strict=True)
        squares = self._products(owners, gradients, gradients), self._products(owners, components, components)
        for gradient, component, ratio in zip(gradients, components, map(_ratio, *squares), strict=True):
            gradient.add_(component * (self.alpha * ratio.sqrt()).to(component))

    def _products(self, parameters: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
        """Return ``<left, right>`` of each tensor, or for each of them the sum over all."""
        if not self.per_tensor:
            return [inner_product(parameters, left, right)] * len(parameters)
        return [inner_product([p], [a], [b]) for p, a, b in zip(parameters, left, right, strict=True)]

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Count the step.

        Args:
            parameters: Every parameter.
        """
        self._steps += 1

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the count and the component of each parameter.

        Args:
            parameters: Every parameter, in the order of the groups.
        """
        return {"steps": self._steps, "component": in_order(self._component, parameters)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Load the count and the component.

        Args:
            state: What ``state_dict`` returned.
            parameters: Every parameter, in the order of the groups.
        """
        self._steps = state.get("steps", 0)
        self._component = by_parameter(state.get("component", []), parameters)


def inner_product(parameters: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return ``<left, right>`` over all tensors, in fp64, shards on other ranks included; 0-dim, not read on the host.

    Args:
        parameters: Whose gradients these are.
        left: Tensors of their shapes, or this rank's parts of them.
        right: The same.
    """
    sums: dict[Shards | None, list[Tensor]] = {}
    for parameter, a, b in zip(parameters, left, right, strict=True):
        sums.setdefault(Shards.of(parameter), []).append(torch.dot(_flat(a), _flat(b)))
    first = next(iter(sums.values()))[0]
    whole = []
    for place, some in sums.items():
        total = torch.stack([to_device(one, first.device) for one in some]).sum()
        whole.append(total if place is None else place.sum(total))
    return torch.stack(whole).sum()


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().flatten()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where there is nothing to divide by."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
