"""Models whose parameters are sharded over ranks, and the textbook step on them in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import fsdp, tensor

from tests.helpers.cases import Epsilon, batch, loss_of

__all__ = ["Scale", "backward_of", "full", "fully_sharded", "own_part", "textbook_sharded_step", "uneven"]

if not hasattr(fsdp, "fully_shard"):
    pytest.skip("torch before 2.6 has no torch.distributed.fsdp.fully_shard", allow_module_level=True)


class Scale(nn.Module):
    """A parameter of one element, which most ranks have nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def uneven(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The classifier of ``cases.mlp`` with shapes that two ranks cannot halve, one of them empty on a rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3), Scale()).to(dtype)


def fully_sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    """``model`` after FSDP2's ``fully_shard`` of each linear layer, and of the whole for what is left."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fsdp.fully_shard(layer, **options)
    return fsdp.fully_shard(model, **options)


def own_part(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """This rank's part of a step's batch."""
    x, y = batch(dtype, seed=step)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return x.tensor_split(ranks)[rank], y.tensor_split(ranks)[rank]


def full(tensors: Any) -> list[Tensor]:
    """Copies of whole tensors, gathered from all ranks."""
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for t in tensors]


def textbook_sharded_step(
    base: torch.optim.Optimizer,
    backward: Callable[[], Tensor],
    epsilon: Epsilon,
    rho: float,
) -> None:
    """One sharpness-aware step in plain torch on whole tensors, around a stock base.

    ``backward`` computes the loss of this rank's batch, calls backward, however often, and returns the loss.
    """
    base.zero_grad()
    backward()
    parameters: Sequence[Any] = [p for group in base.param_groups for p in group["params"] if p.grad is not None]
    moves = epsilon(full(parameters), full(p.grad for p in parameters), [rho] * len(parameters))
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, move in zip(parameters, moves, strict=True):
            whole = (full([p])[0].double() + move).to(p.dtype)
            p.copy_(tensor.distribute_tensor(whole, p.device_mesh, p.placements) if hasattr(p, "placements") else whole)
    base.zero_grad()
    backward()
    with torch.no_grad():
        for p, value in zip(parameters, saved, strict=True):
            p.copy_(value)
    base.step()


def backward_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """What ``textbook_sharded_step`` calls for one batch."""

    def backward() -> Tensor:
        loss = loss_of(model, data)
        loss.backward()
        return loss

    return backward
