"""Numbers that every rank has of its own, as one number for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samopt.distributed.replicas import runs_on_several_ranks

__all__ = ["mean_over_ranks"]


def mean_over_ranks(values: Mapping[str, float | Tensor], group: Any = None) -> dict[str, float]:
    """Return the mean of each value over the ranks that have it: the same numbers on every rank.

    For what is logged, such as ``optimizer.last_step.to_dict()`` and what ``SharpnessMonitor.step`` returns. Every rank
    must call it, also one that has nothing. In a single process, the values come back as they are.

    Cost: it waits for the device and gathers a few bytes from every rank.

    Args:
        values: Numbers by name.
        group: The process group; None is the default one.

    Returns:
        The means, in the order of the first rank that has each.

    Example:
        >>> from samopt.distributed import mean_over_ranks
        >>> mean_over_ranks({"sharpness": 0.25})
        {'sharpness': 0.25}
    """
    own = {name: float(value) for name, value in values.items()}
    if not runs_on_several_ranks():
        return own
    everyones: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyones, own, group=group)
    gathered: dict[str, list[float]] = {}
    for theirs in everyones:
        for name, value in theirs.items():
            gathered.setdefault(name, []).append(value)
    return {name: sum(numbers) / len(numbers) for name, numbers in gathered.items()}
