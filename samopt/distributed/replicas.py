"""Replicas of one model, whose gradients ``DistributedDataParallel`` averages inside backward."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "calling_data_parallel_module",
    "data_parallel_modules",
    "has_graph_to_learn",
    "is_first_rank",
    "runs_on_several_ranks",
    "unsynced",
]


def runs_on_several_ranks() -> bool:
    """Return whether this process belongs to a group of several, which must make the same calls in the same order."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first_rank() -> bool:
    """Return whether this process is the one that speaks for all: rank 0, or the only one there is."""
    return not runs_on_several_ranks() or torch.distributed.get_rank() == 0


def data_parallel_modules(models: nn.Module | Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """Return the DDP modules in ``models``: themselves, inside ``torch.compile``'s or another wrapper, or parts.

    Args:
        models: A module or several.
    """
    models = [models] if isinstance(models, nn.Module) else models
    found = [module for model in models for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return list(dict.fromkeys(found))


def calling_data_parallel_module() -> DistributedDataParallel | None:
    """Return the DDP module whose forward is running, in whichever model it is; None outside such a call."""
    module: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return module


def has_graph_to_learn(models: nn.Module | Sequence[nn.Module]) -> bool:
    """Return whether a DDP module with ``static_graph=True`` is yet to learn its graph, in its first backward.

    torch can only do that with an exchange (pytorch/pytorch#143580).

    Args:
        models: A module or several.
    """
    return any(map(_is_learning, data_parallel_modules(models)))


@contextmanager
def unsynced(models: nn.Module | Sequence[nn.Module]) -> Generator[None]:
    """Keep the gradients of every forward and backward in this context on their rank.

    The first backward of a DDP module with ``static_graph=True`` keeps its exchange: see ``has_graph_to_learn``.

    Args:
        models: A module or several. Where none has a DDP module in it, nothing changes.
    """
    with ExitStack() as stack:
        for module in data_parallel_modules(models):
            if not _is_learning(module):
                stack.enter_context(module.no_sync())
        yield


def _is_learning(module: DistributedDataParallel) -> bool:
    return module.static_graph and not getattr(module, "_static_graph_delay_allreduce_enqueued", True)
