"""Counts what ranks send to each other, below anything that asks them to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Collectives"]


class Collectives(TorchDispatchMode):
    """A context that records every collective operation of this rank, DDP's and FSDP's own included.

    Attributes:
        calls: The name of each operation with the number of elements of its largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and (
            sizes := [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ):
            if "wait_tensor" not in func.name():
                self.calls.append((func.name().partition("::")[2].partition(".")[0], max(sizes)))
        return func(*args, **(kwargs or {}))
