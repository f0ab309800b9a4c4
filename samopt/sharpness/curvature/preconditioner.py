"""What an optimizer multiplies its gradients with, and where its stability ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from samopt._numerics.low_precision import widen

__all__ = ["Preconditioner", "preconditioner_of"]

_KNOWN = "SGD, Adam, AdamW, RMSprop and Adagrad"


@dataclass(frozen=True)
class Preconditioner:
    """``P^-1`` of the update ``w - lr P^-1 g``, elementwise, and the largest stable eigenvalue of ``P^-1 H``.

    Attributes:
        scales: ``P^-1`` for each weight: a tensor of its shape, or a number. Learning rates relative to the first
            group's are part of it.
        threshold: Largest eigenvalue at which a quadratic loss does not diverge under full-batch steps.
        lr: The first group's learning rate.
    """

    scales: list[Tensor | float]
    threshold: float
    lr: float


def preconditioner_of(optimizer: Any, weights: Sequence[Tensor]) -> Preconditioner:
    """Return the present preconditioner of an optimizer; wrappers such as samopt's are looked into.

    The thresholds are those of a quadratic: ``2 (1 + beta) / ((1 - dampening) lr)`` for SGD with momentum,
    ``2 (1 + beta) / ((1 + 2 beta) lr)`` with Nesterov's, and ``2 (1 + beta1) / ((1 - beta1) lr)`` for Adam, whose
    momentum is an average (Cohen et al. 2022, "Adaptive Gradient Methods at the Edge of Stability", section 2).

    Args:
        optimizer: SGD, Adam, AdamW, RMSprop or Adagrad, wrapped or not, after its first step.
        weights: The weights that the measure is about.

    Raises:
        TypeError: If it is another optimizer.
        ValueError: If it does not update one of the weights, has not stepped yet, or its learning rate is 0.
    """
    base = _unwrap(optimizer)
    groups = {id(parameter): group for group in base.param_groups for parameter in group["params"]}
    if any(id(weight) not in groups for weight in weights):
        raise ValueError(
            f"{type(base).__name__} does not update every weight that is measured; give the optimizer of this model, "
            "or choose its weights with parameters="
        )
    first = groups[id(weights[0])]
    lr = float(first["lr"])
    if not lr > 0:
        raise ValueError(
            f"the learning rate is {lr}, at which everything is stable; measure before a schedule has ended, or use "
            "hessian_eigenvalues"
        )
    scales = [
        _scale(base, groups[id(weight)], base.state.get(weight, {})) * (float(groups[id(weight)]["lr"]) / lr)
        for weight in weights
    ]
    thresholds = {_threshold(base, groups[id(weight)]) for weight in weights}
    if len(thresholds) > 1:
        raise ValueError(
            "the groups differ in their momentum or betas, so there is no one threshold for all of them; choose the "
            "weights of one group with parameters=, or use hessian_eigenvalues"
        )
    return Preconditioner(scales, thresholds.pop() / lr, lr)


def _unwrap(optimizer: Any) -> Optimizer:
    while True:
        if isinstance(inner := getattr(optimizer, "base_optimizer", None), Optimizer):
            optimizer = inner
        elif isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        else:
            break
    if not isinstance(optimizer, SGD | Adam | AdamW | RMSprop | Adagrad):
        raise TypeError(
            f"the preconditioner of {type(optimizer).__name__} is not known; there are those of {_KNOWN}; use "
            "hessian_eigenvalues, which needs none"
        )
    return optimizer


def _scale(base: Optimizer, group: dict[str, Any], state: dict[str, Any]) -> Tensor | float:
    if isinstance(base, SGD):
        return 1.0
    keys = {Adagrad: "sum", RMSprop: "square_avg"}
    key = next((name for kind, name in keys.items() if isinstance(base, kind)), "exp_avg_sq")
    if group.get("amsgrad"):
        key = "max_exp_avg_sq"
    if key not in state:
        raise ValueError(
            f"{type(base).__name__} has no {key!r} for a weight that is measured; measure after its first step, and "
            "leave out what it does not update with parameters="
        )
    second: Tensor = widen(state[key])
    if isinstance(base, Adam | AdamW):
        step = float(torch.as_tensor(state["step"]))
        beta1, beta2 = (float(beta) for beta in group["betas"])
        first_moment: float = 1 - beta1**step
        root = second.div(1 - beta2**step).sqrt_().add_(group["eps"])
        return root.mul_(first_moment).reciprocal_()
    if isinstance(base, RMSprop) and group["centered"]:
        second = (second - widen(state["grad_avg"]).square()).clamp_min_(0)
    scale = second.sqrt().add_(group["eps"]).reciprocal_()
    if isinstance(base, Adagrad):
        scale.div_(1 + (float(torch.as_tensor(state["step"])) - 1) * group["lr_decay"])
    return scale


def _threshold(base: Optimizer, group: dict[str, Any]) -> float:
    """Return the threshold times the learning rate."""
    if isinstance(base, Adam | AdamW):
        beta = float(group["betas"][0])
        return 2 * (1 + beta) / (1 - beta)
    momentum = float(group.get("momentum", 0.0))
    if group.get("nesterov"):
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    undamped = 1 - float(group.get("dampening", 0.0)) if momentum else 1.0
    return 2 * (1 + momentum) / undamped
