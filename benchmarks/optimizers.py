"""The optimizers that are compared; importing this module registers them.

Radii, momentum and weight decay are the SAM and ASAM papers', AdamW's settings torch's. On held-out digits with clean
labels, SGD does equally well with learning rates from 0.01 to 0.1; 0.02 is used because at 0.1, the papers' value, ASAM
sometimes stays near its start. With random labels a smaller rate helps every optimizer, SGD most: see
docs/results/README.md before reading anything into a gain.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

import samopt
from benchmarks.registry import OPTIMIZERS, OptimizerCase

__all__ = ["ADAMW", "ADAMW_SAM", "ASAM", "SAM", "SGD"]

_SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}
_ADAMW = {"lr": 1e-3, "weight_decay": 0.01}
_SAM = {"rho": 0.05, "rho_warmup": 0.0}
_ASAM = {"rho": 0.5, "eta": 0.01, "rho_warmup": 0.0}


def _build_sgd(model: nn.Module, settings: Mapping[str, float]) -> Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=settings["lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )


def _build_adamw(model: nn.Module, settings: Mapping[str, float]) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])


def _build_sam(model: nn.Module, settings: Mapping[str, float]) -> Optimizer:
    return samopt.SAM(_build_sgd(model, settings), rho=settings["rho"], model=model)


def _build_asam(model: nn.Module, settings: Mapping[str, float]) -> Optimizer:
    return samopt.ASAM(_build_sgd(model, settings), rho=settings["rho"], eta=settings["eta"], model=model)


def _build_adamw_sam(model: nn.Module, settings: Mapping[str, float]) -> Optimizer:
    return samopt.SAM(_build_adamw(model, settings), rho=settings["rho"], model=model)


SGD = OPTIMIZERS.add(OptimizerCase("sgd", "SGD with momentum", "sgd", _SGD, _build_sgd))
SAM = OPTIMIZERS.add(OptimizerCase("sam", "SAM around that SGD", "sgd", _SGD | _SAM, _build_sam))
ASAM = OPTIMIZERS.add(OptimizerCase("asam", "ASAM around that SGD", "sgd", _SGD | _ASAM, _build_asam))
ADAMW = OPTIMIZERS.add(OptimizerCase("adamw", "AdamW", "adamw", _ADAMW, _build_adamw))
ADAMW_SAM = OPTIMIZERS.add(
    OptimizerCase("adamw+sam", "SAM around that AdamW", "adamw", _ADAMW | _SAM, _build_adamw_sam)
)
