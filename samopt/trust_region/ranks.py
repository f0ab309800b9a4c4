"""The distance over all ranks that train one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["sum_over_ranks"]


def sum_over_ranks(values: Tensor, model: nn.Module) -> Tensor:
    """Return the sum of ``values`` over the ranks of a DDP or sharded model; the values themselves for any other.

    Cost: one all-reduce of a few numbers, without waiting for it on the host.

    Args:
        values: Numbers of this rank.
        model: The module that the training loop calls.
    """
    for group in _groups(model):
        values = values.clone()
        torch.distributed.all_reduce(values, group=group)
    return values


def _groups(model: nn.Module) -> list[torch.distributed.ProcessGroup]:
    """Return the process groups that average this model's gradients: DDP's, or those of its parameters' mesh."""
    if isinstance(model, DistributedDataParallel):
        return [model.process_group]
    meshes = [mesh for parameter in model.parameters() if (mesh := getattr(parameter, "device_mesh", None)) is not None]
    return [meshes[0].get_group(dimension) for dimension in range(meshes[0].ndim)] if meshes else []
