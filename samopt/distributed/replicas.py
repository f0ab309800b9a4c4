"""Replicas of one model, whose gradients ``DistributedDataParallel`` averages inside backward."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["data_parallel_modules", "is_first_rank", "runs_on_several_ranks", "unsynced"]


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


@contextmanager
def unsynced(models: nn.Module | Sequence[nn.Module]) -> Generator[None]:
    """Keep the gradients of every forward and backward in this context on their rank.

    A DDP module with ``static_graph=True`` learns its graph in the first backward, which torch can only do with an
    exchange (pytorch/pytorch#143580): that one, on every rank, keeps it.

    Args:
        models: A module or several. Where none has a DDP module in it, nothing changes.
    """
    with ExitStack() as stack:
        for module in data_parallel_modules(models):
            if not module.static_graph or getattr(module, "_static_graph_delay_allreduce_enqueued", True):
                stack.enter_context(module.no_sync())
        yield
