"""A loop by hand for one pass along the momentum: move the weights, forward, backward, put them back, step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import samopt
from tests.helpers.cases import BASES, Epsilon, asam_epsilon, bits, fisher_epsilon, sam_epsilon

RHO = 0.3
AHEAD, UPHILL = -1, 1
DIRECTIONS = {"momentum": AHEAD, "momentum-uphill": UPHILL}
CLIPPED_NORM = 0.3
FRAMEWORK_CASES = {
    "sam": ("sam", "momentum", False),
    "asam, clipped": ("asam", "momentum", True),
    "sam, uphill": ("sam", "momentum-uphill", False),
    "momentum-sam": ("momentum-sam", "momentum", True),
}
"""Variant, direction and whether gradients are clipped, for the tests of training frameworks."""

GEOMETRIES: dict[str, tuple[Any, Epsilon]] = {
    "sam": (samopt.SAM, sam_epsilon),
    "asam": (samopt.ASAM, asam_epsilon),
    "fisher": (samopt.FisherSAM, fisher_epsilon),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return BASES["sgd-momentum"](parameters)


def one_pass(
    model: nn.Module,
    base: Any = sgd,
    /,
    *,
    geometry: str = "sam",
    direction: Any = "momentum",
    rho: float = RHO,
    **more: Any,
) -> samopt.SharpnessAwareOptimizer:
    """An optimizer that follows a model, in one pass along the momentum."""
    made = BASES[base](model.parameters()) if isinstance(base, str) else base(model.parameters())
    return GEOMETRIES[geometry][0](made, rho=rho, direction=direction, **{"model": model} | more)


def momenta_of(base: torch.optim.Optimizer) -> list[Tensor | None]:
    """The running average of each parameter, None before the first step."""
    states = [base.state.get(p, {}) for group in base.param_groups for p in group["params"]]
    return [state.get("momentum_buffer", state.get("exp_avg")) for state in states]


def hand_step(
    base: torch.optim.Optimizer,
    backward: Callable[[], Any],
    *,
    epsilon: Epsilon = sam_epsilon,
    sign: int = AHEAD,
    rho: float | list[float] = RHO,
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float | None = None,
) -> Any:
    """One step of a stock optimizer, whose gradient is taken at ``w`` moved along its own momentum.

    A radius of 0 for a parameter leaves it out of the norm, too. ``backward`` scales its loss by the scaler. Returns
    what ``backward`` does.
    """
    parameters = [p for group in base.param_groups for p in group["params"]]
    rhos = rho if isinstance(rho, list) else [rho] * len(parameters)
    start = [p.detach().clone() for p in parameters]
    momenta = [m if r else None for m, r in zip(momenta_of(base), rhos, strict=True)]
    moves = epsilon(start, momenta, rhos)
    with torch.no_grad():
        for p, move in zip(parameters, moves, strict=True):
            p.copy_(p.double() + sign * move)
    base.zero_grad()
    result = backward()
    with torch.no_grad():
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)
    if scaler is not None:
        scaler.unscale_(base)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    if scaler is None:
        base.step()
    else:
        scaler.step(base)
        scaler.update()
    return result


def train_both(
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int], Tensor],
    *,
    base: Any = sgd,
    steps: int = 4,
    geometry: str = "sam",
) -> tuple[nn.Module, nn.Module]:
    """Train a model in the unchanged loop, and another by hand; the first one's weights never move before the step."""
    ours, theirs = make(), make()
    optimizer = one_pass(ours, base, geometry=geometry)
    stock = base(theirs.parameters())
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        exact = bits(ours)
        value = loss(ours, step)
        assert all(map(torch.equal, exact, bits(ours)))
        value.backward()
        assert all(map(torch.equal, exact, bits(ours)))
        optimizer.step()
        torch.manual_seed(step)
        hand_step(stock, lambda step=step: loss(theirs, step).backward(), epsilon=GEOMETRIES[geometry][1])
    assert optimizer.last_step.to_dict()["applied_radius"] > 0
    return ours, theirs


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    """Equality of fp64 parameters and buffers up to the rounding of their operations."""
    for state in ("parameters", "buffers"):
        for got, want in zip(getattr(ours, state)(), getattr(theirs, state)(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
