"""The distance over all ranks that train one model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from samopt.distributed import data_parallel_modules

__all__ = ["sum_over_ranks"]


def sum_over_ranks(values: Tensor, model: nn.Module, parameters: Iterable[Tensor]) -> Tensor:
    """Return the sum of ``values`` over the ranks of a DDP or sharded model; the values themselves for any other.

    Cost: one all-reduce of a few numbers, without waiting for it on the host.

    Args:
        values: Numbers of this rank.
        model: The module that the training loop calls.
        parameters: What the optimizer updates.
    """
    for group in _groups(model, parameters):
        values = values.clone()
        torch.distributed.all_reduce(values, group=group)
    return values


def _groups(model: nn.Module, parameters: Iterable[Tensor]) -> list[Any]:
    """Return the process groups that average this model's gradients: DDP's, or those of its parameters' largest mesh.

    Ranks that differ only in a tensor-parallel dimension add equal numbers, which a ratio of two sums does not notice.
    """
    if replicated := data_parallel_modules(model):
        return [replicated[0].process_group]
    meshes = [mesh for parameter in parameters if (mesh := getattr(parameter, "device_mesh", None)) is not None]
    largest = max(meshes, key=lambda mesh: mesh.size(), default=None)
    return [] if largest is None else [largest.get_group(dimension) for dimension in range(largest.ndim)]
