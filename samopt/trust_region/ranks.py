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

    Raises:
        RuntimeError: If ranks may have left the loop, under ``Join``.
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
        _refuse_join(replicated[0])
        return [replicated[0].process_group]
    meshes = [mesh for parameter in parameters if (mesh := getattr(parameter, "device_mesh", None)) is not None]
    largest = max(meshes, key=lambda mesh: mesh.size(), default=None)
    return [] if largest is None else [largest.get_group(dimension) for dimension in range(largest.ndim)]


def _refuse_join(model: nn.Module) -> None:
    """Raise in torch's ``Join``: a rank without inputs takes part in DDP's exchanges, and in no others."""
    config = getattr(model, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            "TRAM averages its distance over all ranks in every step, but inside Join(...) a rank that has run out of "
            "batches would not answer, and the others would wait for it. Give all ranks the same number of batches, "
            "or use Join(..., throw_on_early_termination=True), which ends the loop of all ranks together"
        )
