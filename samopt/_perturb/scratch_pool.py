"""Memory that is kept from step to step: for the old weights in two passes, for ``w + epsilon`` in one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samopt.distributed import local_part

__all__ = ["ScratchPool"]


class ScratchPool:
    """Persistent memory, one buffer per parameter, handed out again in every step.

    A new allocation of this size would cost more than the copy into it: a CPU gets new memory page by page. Buffers
    belong to parameter objects and not to addresses, so parameters that share memory have a buffer each. What a buffer
    holds is overwritten when it is handed out the next time. Copies and pickles of a pool are empty.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffer] = {}

    def like(self, parameter: Tensor) -> Tensor:
        """Return memory with the shape, dtype, device and memory layout of a parameter; of its local part if sharded.

        The buffer is the one of the last call, unless one of these has changed. Its values are arbitrary.
        """
        return self.like_all([parameter], [local_part(parameter)])[0]

    def like_all(self, owners: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return memory like each tensor; the buffers belong to the owners.

        Args:
            owners: Parameters.
            tensors: The parameters themselves, or the local part of each.
        """
        known, found = self._buffers, []
        for owner, tensor in zip(owners, tensors, strict=True):
            buffer = known.get(id(owner))
            kind = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            # An id may be used again after its tensor is gone, so the reference has the last word.
            if buffer is None or buffer.kind != kind or buffer.owner() is not owner:
                buffer = known[id(owner)] = self._new_buffer(owner, tensor, kind)
            found.append(buffer.memory)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return ScratchPool, ()

    def _new_buffer(self, owner: Tensor, tensor: Tensor, kind: tuple[Any, ...]) -> _Buffer:
        """Return a buffer that leaves the pool when its owner is deleted."""
        key, known = id(owner), self._buffers

        def forget(reference: weakref.ref[Tensor]) -> None:
            known.pop(key, None)

        return _Buffer(weakref.ref(owner, forget), kind, torch.empty_like(tensor, requires_grad=False))


class _Buffer(NamedTuple):
    """Memory, the parameter that it belongs to, and the shape, strides, dtype and device that it was made for."""

    owner: weakref.ref[Tensor]
    kind: tuple[Any, ...]
    memory: Tensor
