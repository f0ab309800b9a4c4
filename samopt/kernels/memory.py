"""Where the values of tensors lie, and who else can reach them there."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

__all__ = [
    "IS_CPU",
    "NEW_MEMORY",
    "WORTHWHILE",
    "Spare",
    "flat",
    "holders",
    "lie_alike",
    "note_writes",
    "owns_its_memory",
    "room_for",
    "under_own_names",
]

IS_CPU = attrgetter("is_cpu")
"""Of a tensor."""

WORTHWHILE = 1 << 14
"""Elements; memory of fewer is quickly had anew."""


def lie_alike(weight: Tensor, direction: Tensor) -> bool:
    """Return whether both tensors fill their memory without gaps, element beside element in the same order.

    Args:
        weight: A strided tensor.
        direction: A strided tensor of the same shape.
    """
    if weight.is_contiguous():
        return direction.is_contiguous()
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(weight)
    return dense and weight.stride() == direction.stride()


def flat(tensor: Tensor) -> Tensor:
    """Return a gapless tensor's values as a vector in the order of memory, sharing that memory.

    Args:
        tensor: A tensor that fills its memory without gaps; autograd is off.
    """
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def note_writes(tensors: Sequence[Tensor]) -> None:
    """Have autograd notice that tensors were written to, where what wrote does not tell it.

    Args:
        tensors: They, or others that share their memory and version.
    """
    if _counts_many():
        torch.autograd.graph.increment_version(tensors)
    else:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def owns_its_memory(tensor: Tensor) -> bool:
    """Return whether ``tensor`` fills its memory and nobody else can reach it.

    Not so for a view (a DDP bucket's, a flat parameter's), for a tensor that somebody else still holds under another
    name, and for memory that belongs to NumPy or, on the CPU, to several processes.

    Args:
        tensor: A strided tensor.
    """
    storage = tensor.untyped_storage()
    return (
        storage.nbytes() == tensor.numel() * tensor.element_size()
        and storage.resizable()  # which memory from or for NumPy is not
        and not (tensor.is_cpu and storage.is_shared())  # of other devices' memory, torch says that all of it is
        and _holders(storage) == _one_holder()
    )


def holders(tensor: Tensor) -> int:
    """Return how many tensors hold the memory of ``tensor``, plus a constant.

    Args:
        tensor: A strided tensor.
    """
    return _holders(tensor.untyped_storage())


def under_own_names(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors so that ``owns_its_memory`` can tell, once we alone should hold them, whether somebody else does.

    Args:
        tensors: Any tensors; where all are on the CPU and small, so that their memory is not worth taking, they are
            returned themselves.
    """
    if max(map(Tensor.numel, tensors), default=0) <= WORTHWHILE and all(map(IS_CPU, tensors)):
        return tensors
    return [tensor.data for tensor in tensors]


class Spare:
    """Memory of tensors that nobody needs any more, to be written to in place of new memory.

    On a CPU the system hands out new memory page by page, which takes several times as long as writing to it; the
    allocators of accelerators keep what was freed.

    Args:
        tensors: Any tensors; only those on the CPU that own their memory, once it is asked for, are used.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._vectors: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        for tensor in tensors:
            size = tensor.numel()
            if size >= WORTHWHILE and type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided:
                self._vectors.setdefault((tensor.dtype, size), []).append(tensor.detach())

    def like(self, tensor: Tensor) -> Tensor:
        """Return memory of a tensor's dtype, shape and layout, with any values; each is handed out once.

        Args:
            tensor: A strided tensor.
        """
        vectors = self._vectors.get((tensor.dtype, tensor.numel()))
        if vectors and tensor.is_cpu and lie_alike(tensor, tensor):
            while vectors:
                vector = vectors.pop()
                if owns_its_memory(vector):
                    return vector.as_strided(tensor.shape, tensor.stride())
        return torch.empty_like(tensor)


NEW_MEMORY = Spare()


def room_for(weight: Tensor, direction: Tensor, consume: bool, spare: Spare) -> Tensor:
    """Return memory for the values of a weight: its direction's where that may be overwritten, else other memory.

    Args:
        weight: The weight.
        direction: A tensor laid out like it.
        consume: Whether the direction may be overwritten where nobody else can reach it.
        spare: Where other memory comes from.
    """
    return direction if consume and owns_its_memory(direction) else spare.like(weight)


def _holders(storage: torch.UntypedStorage) -> int:
    """Return how many tensors hold ``storage``, plus a constant for the Python object that asks."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


@functools.cache
def _counts_many() -> bool:
    """Return whether torch takes several tensors at once; 2.4 does not."""
    try:
        torch.autograd.graph.increment_version(())
    except (RuntimeError, TypeError):
        return False
    return True


@functools.cache
def _one_holder() -> int:
    tensor = torch.empty(0)
    return _holders(tensor.untyped_storage())
