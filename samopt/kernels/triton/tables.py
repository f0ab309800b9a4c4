"""Pointer tables: where the chunks of many tensors are, in device memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from samopt._callers.cuda_graphs import is_capturing

__all__ = ["CHUNK", "PointerTable", "addresses_of", "boundaries", "pointer_table"]

_T = TypeVar("_T")

CHUNK = 1 << 14  # elements that one program works on; a multiple of every block
_TABLES = 64  # a step needs two or three for each dtype and group
_captured: list[Tensor] = []  # host memory that CUDA graphs copy from at every replay


@dataclass(frozen=True)
class PointerTable:
    """Chunks of tensors with one memory layout, one column a chunk.

    Attributes:
        data: int64 of shape ``(rows + 1, chunks)``, on the device: a row of addresses for each list of tensors, then
            the numbers of elements.
        chunks: How many chunks there are.
    """

    data: Tensor
    chunks: int


def addresses_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return where the tensors' memory begins.

    Args:
        tensors: Any tensors.
    """
    return tuple(tensor.data_ptr() for tensor in tensors)


def pointer_table(
    addresses: tuple[tuple[int, ...], ...], strides: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> PointerTable:
    """Return a table; the same one for the same addresses and sizes, and never one with an address that has changed.

    Args:
        addresses: Of each list of tensors; 0 for none.
        strides: For each list, the bytes from one chunk of a tensor to the next.
        sizes: The tensors' numbers of elements.
        device: Where the tensors are.
    """
    return _unless_captured(_table, device)(addresses, strides, sizes, device)


def boundaries(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where lists of these sizes, laid end to end, begin, and where the last one ends: int64, on the device.

    Args:
        sizes: Numbers of entries.
        device: Where the result goes.
    """
    return _unless_captured(_boundaries, device)(sizes, device)


def _unless_captured(made: functools._lru_cache_wrapper[_T], device: torch.device) -> Callable[..., _T]:
    """Return the function behind the cache where a CUDA graph is captured: what it makes is filled at a replay only."""
    return made.__wrapped__ if is_capturing(device) else made


@functools.lru_cache(maxsize=_TABLES)
def _table(
    addresses: tuple[tuple[int, ...], ...], strides: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> PointerTable:
    elements = torch.tensor(sizes, dtype=torch.int64)
    chunks = (elements + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    within = torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor]
    starts = [torch.tensor(row, dtype=torch.int64)[tensor] for row in addresses]
    rows = [start + (start != 0) * within * stride for start, stride in zip(starts, strides, strict=True)]
    rows.append((elements[tensor] - within * CHUNK).clamp(max=CHUNK))
    return PointerTable(_on_device(torch.stack(rows), device), len(tensor))


@functools.lru_cache(maxsize=_TABLES)
def _boundaries(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return _on_device(torch.tensor((0, *itertools.accumulate(sizes)), dtype=torch.int64), device)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return host values on a device, without waiting for it."""
    if device.type != "cuda":
        return values
    pinned = values.pin_memory()
    if is_capturing(device):
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)
