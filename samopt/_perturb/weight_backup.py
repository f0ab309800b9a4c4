"""Saved weights, and how they return to their parameters after a forward that gave these other memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from samopt.kernels import Backend

__all__ = ["SavedWeights", "WeightBackup"]

_DTYPE = attrgetter("dtype")
_PLAIN = {Tensor, nn.Parameter}


class WeightBackup:
    """What puts weights back, bit for bit.

    Args:
        blocks: The saved weights of each block, in the order in which the blocks move.
    """

    def __init__(self, blocks: Sequence[SavedWeights]) -> None:
        self.blocks = blocks

    def restore(self) -> None:
        """Write every saved weight back, through its parameter, to its original memory.

        A call that was interrupted may be repeated. After a complete one, further calls do nothing.
        """
        with torch.no_grad():
            # Last first: a kernel that saves while it moves has saved what an earlier block left in shared memory.
            for saved in reversed(self.blocks):
                saved.restore()
        self.blocks = ()


@dataclass
class SavedWeights:
    """Saved values of several weights.

    Attributes:
        weights: The weights.
        originals: Other names of their memory, which stay there when a forward gives a weight other memory. They share
            the version counter of the weight, so a write through them is seen by autograd.
        values: The old values of each.
        rows: For weights of which only some rows are saved, which ones; None is all of each weight.
        addresses: Where their storages were when they were saved.
        layouts: Their shapes, strides and dtypes then.
        kernel: The backend that fills ``values`` while it moves the weights; None where they are copies already.
        kernel_backup: Its backup.
    """

    weights: list[Tensor]
    originals: list[Tensor]
    values: list[Tensor]
    rows: list[tuple[Tensor, ...]] | None
    addresses: list[int]
    layouts: list[Any]
    kernel: Backend | None = None
    kernel_backup: Any = None

    @classmethod
    def of(cls, weights: list[Tensor], values: list[Tensor]) -> SavedWeights:
        """Return a backup of weights whose ``values`` the caller fills; autograd is off."""
        # detach() and not .data, which would have a version counter of its own
        return cls(weights, list(map(Tensor.detach, weights)), values, None, _addresses(weights), _layouts(weights))

    @classmethod
    def save_rows(cls, weights: list[Tensor], rows: list[Any]) -> SavedWeights:
        """Copy some rows of each weight; autograd is off."""
        saved = cls.of(weights, [weight.detach()[some] for weight, some in zip(weights, rows, strict=True)])
        saved.rows = rows
        return saved

    def restore(self) -> None:
        """Write the values back; may be called any number of times."""
        originals = self.originals
        has_moved = _addresses(originals) != self.addresses  # a forward has resized the storage itself
        if has_moved:
            list(map(_make_room, originals))
        # A kernel writes to the addresses of the past. Where they are no longer valid, a forward has run, so the kernel
        # has moved the weights before and its backup is complete.
        if self.kernel is not None and self.kernel.restore is not None and not has_moved:
            self.kernel.restore(self.kernel_backup)
        elif self.rows is None:
            torch._foreach_copy_(originals, self.values)
        else:
            for original, rows, values in zip(originals, self.rows, self.values, strict=True):
                original[rows] = values
        weights = self.weights
        if has_moved or _addresses(weights) != self.addresses or _layouts(weights) != self.layouts:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original


# The next two run in every step: map over C functions takes a third of the time of a loop in Python.
def _addresses(tensors: list[Tensor]) -> list[int]:
    """Return the address of each tensor; nothing where a tensor has no memory of its own, as a ``DTensor``."""
    return list(map(Tensor.data_ptr, tensors)) if _PLAIN.issuperset(map(type, tensors)) else []


def _layouts(tensors: list[Tensor]) -> list[Any]:
    """Return shapes, strides and dtypes of the tensors."""
    return [*map(Tensor.size, tensors), *map(Tensor.stride, tensors), *map(_DTYPE, tensors)]


def _make_room(tensor: Tensor) -> None:
    """Give the storage of a tensor its size back, where a forward has shrunk it; a copy would write past its end."""
    storage = tensor.untyped_storage()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    if storage.nbytes() < needed:
        storage.resize_(int(needed))
