"""The optimizers that are compared; importing this module registers them.

Radii, momentum and weight decay are the SAM and ASAM papers', and AdamW's settings torch's. The learning rate is the best
for the base alone among 0.01, 0.02, 0.05, 0.1 (SGD) and 0.0003, 0.001, 0.003 (AdamW), on held-out training data of digits
with and without label noise; nothing was chosen for the sharpness-aware ones.
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
