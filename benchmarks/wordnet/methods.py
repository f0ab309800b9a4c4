"""The compared optimizers: each with the one setting that is chosen on validation data, from three values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import samopt
from samopt.trust_region import EMA, InputNoise

__all__ = ["ADAMW", "METHODS", "Method"]

_LEARNING_RATES = (5e-4, 1e-3, 2e-3)
_LARGEST_RADIUS = 2.0  # of TRAM; about four times what suits ASAM
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: What a person types.
        setting: The setting that is chosen.
        values: What it is chosen from.
        build: Makes the optimizer from a model, the learning rate and the setting; for AdamW the two are the same.
    """

    name: str
    setting: str
    values: tuple[float, ...]
    build: Callable[[nn.Module, float, float], Optimizer]


def _adamw(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=_WEIGHT_DECAY)


def _tram(name: str, region: Callable[[], Any], values: tuple[float, ...], metric: str = "adaptive") -> Method:
    def build(model: nn.Module, lr: float, scale: float) -> Optimizer:
        return samopt.TRAM(
            _adamw(model, lr),
            model=model,
            trust_region=region(),
            scale=scale,
            max_radius=_LARGEST_RADIUS,
            metric=metric,
        )

    return Method(name, "scale", values, build)


ADAMW = Method("adamw", "lr", _LEARNING_RATES, lambda model, lr, value: _adamw(model, value))
METHODS = {
    method.name: method
    for method in (
        ADAMW,
        Method("sam", "rho", (0.02, 0.1, 0.5), lambda m, lr, rho: samopt.SAM(_adamw(m, lr), rho=rho, model=m)),
        Method("asam", "rho", (0.1, 0.5, 2.0), lambda m, lr, rho: samopt.ASAM(_adamw(m, lr), rho=rho, model=m)),
        Method("fisher", "rho", (0.02, 0.1, 0.5), lambda m, lr, rho: samopt.FisherSAM(_adamw(m, lr), rho=rho, model=m)),
        _tram("tram-previous", lambda: "previous", (100.0, 1000.0, 10000.0)),
        _tram("tram-ema", lambda: EMA(decay=0.95), (3.0, 10.0, 30.0)),
        _tram("tram-pretrained", lambda: "pretrained", (0.3, 1.0, 3.0)),
        _tram("tram-noise", lambda: InputNoise(std=0.1), (100.0, 300.0, 1000.0)),
        _tram("tram-fisher", lambda: InputNoise(std=0.1), (20.0, 100.0, 500.0), metric="fisher"),
    )
}
"""By name, the base first."""
