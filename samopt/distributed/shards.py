"""Tensors that are sharded over a device mesh: their local parts, and their length as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samopt._numerics.vector_norm import vector_norm

__all__ = ["Shards", "abandon_pass", "is_fully_sharded", "local_part", "reshard"]


@dataclass(frozen=True)
class Shards:
    """Where the other parts of a ``DTensor`` are.

    Attributes:
        mesh: Its ``DeviceMesh``.
        dimensions: The dimensions of the mesh that it is sharded over; it is replicated over the others.
    """

    mesh: Any
    dimensions: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Shards | None:
        """Return where the shards of ``tensor`` are, or None if this rank has all of it.

        Args:
            tensor: Any tensor.
        """
        mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", ())
        dimensions = tuple(index for index, placement in enumerate(placements) if not placement.is_replicate())
        return cls(mesh, dimensions) if dimensions else None

    @property
    def position(self) -> int:
        """Which shard this rank has, counted from 1; replicas of a shard have the same."""
        position = 0
        for dimension in self.dimensions:
            position = position * self.mesh.size(dimension) + self.mesh.get_local_rank(dimension)
        return position + 1

    def combine(self, length: Tensor, *, largest: bool = False) -> Tensor:
        """Return the length of a vector from the length of this rank's part of it.

        Cost: for each dimension, one all-gather of one number a rank. Every rank gets the same bits.

        Args:
            length: 0-dim, >= 0 or not finite.
            largest: Take the largest length among the parts instead of their l2 norm.

        Returns:
            The length, on the same device.
        """
        return self._join(length, torch.amax if largest else vector_norm)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all parts of a number that this rank has for its own.

        Cost: as for ``combine``. Every rank gets the same bits.

        Args:
            value: 0-dim.

        Returns:
            The sum, on the same device.
        """
        return self._join(value, torch.sum)

    def _join(self, value: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
        combined = value.reshape(1).to(self.mesh.device_type)
        for dimension in self.dimensions:
            group = self.mesh.get_group(dimension)
            parts = [torch.empty_like(combined) for _ in range(group.size())]
            torch.distributed.all_gather(parts, combined, group=group)
            combined = join(torch.cat(parts)).reshape(1)
        return combined.reshape(()).to(value.device)


def local_part(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return this rank's part of a ``DTensor``, sharing its memory; any other tensor as it is.

    Args:
        tensor: Any tensor.
        like: A tensor of the same shape, such as the weight of a gradient, whose parts to match; a gradient that waits
            to be summed, or is sharded otherwise, is brought to the same placement.
    """
    placements = getattr(like, "placements", None)
    own = getattr(tensor, "placements", None)
    if own is None:
        return tensor
    with torch.no_grad():
        sharded: Any = tensor
        if placements is not None and placements != own:
            sharded = sharded.redistribute(placements=placements)
        part: Tensor = sharded.to_local()
        return part.wait() if hasattr(part, "wait") else part  # it may still be under way


def reshard(model: nn.Module | None) -> None:
    """Drop gathered copies of sharded parameters, which a change of the shards makes stale.

    FSDP keeps them after a forward pass without a graph, and where it was told not to free them after backward.

    Args:
        model: A module with ``fully_shard``ed modules in it; for any other, and for None, nothing changes.
    """
    for module in _fully_sharded(model):
        module.reshard()


def abandon_pass(model: nn.Module | None) -> None:
    """Have FSDP forget a forward or backward pass that an exception cut short, gathered parameters included.

    Args:
        model: As for ``reshard``.
    """
    inside: set[nn.Module] = set()
    for module in _fully_sharded(model):
        if module not in inside and hasattr(module, "reset_iter_state"):  # older torch has no such thing
            module.reset_iter_state()
        inside.update(module.modules())


def _fully_sharded(model: nn.Module | None) -> list[Any]:
    """Return the modules that ``fully_shard`` was called on, outer ones first."""
    return [] if model is None else [module for module in model.modules() if is_fully_sharded([module])]


def is_fully_sharded(modules: Iterable[nn.Module]) -> bool:
    """Return whether ``fully_shard`` was called on one of some modules.

    Args:
        modules: Every module of a model.
    """
    for module in modules:
        kind = type(module)  # ``fully_shard`` changes it; a name that a module lacks is slow to look for in the module
        if hasattr(kind, "set_requires_gradient_sync") and hasattr(kind, "reshard"):
            return True
    return False
