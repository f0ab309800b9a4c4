"""The layout of tensors in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["bump_versions", "flat", "same_memory_layout"]


def same_memory_layout(first: Tensor, second: Tensor) -> bool:
    """Return whether two strided tensors of one shape fill their memory without gaps, in the same order of elements."""
    if first.is_contiguous():
        return second.is_contiguous()
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(first)
    return dense and first.stride() == second.stride()


def flat(tensor: Tensor) -> Tensor:
    """Return the values of a tensor without gaps as a vector in the order of memory, sharing that memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors were written to, where a kernel wrote to their addresses."""
    if _takes_several():
        torch.autograd.graph.increment_version(tensors)
    else:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


@functools.cache
def _takes_several() -> bool:
    """Return whether ``increment_version`` takes several tensors at once; that of torch 2.4 does not."""
    try:
        torch.autograd.graph.increment_version(())
    except (RuntimeError, TypeError):
        return False
    return True
