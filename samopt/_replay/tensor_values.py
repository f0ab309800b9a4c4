"""Values of tensors that a forward may write into: copied, compared and put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "PLAIN_TENSORS",
    "SMALL",
    "TensorCopy",
    "copies_of",
    "is_plain",
    "mark_of",
    "memory_of",
    "put_back_values",
]

PLAIN_TENSORS = (Tensor, nn.Parameter)
SMALL = 4096  # elements; a copy of fewer is cheaper than to find out whether they changed


class TensorCopy(NamedTuple):
    """A tensor as it was at one time.

    Attributes:
        tensor: What was copied.
        memory: What gave it its memory.
        values: Its values, in memory of their own.
        version: Its version counter.
    """

    tensor: Tensor
    memory: Tensor
    values: Tensor
    version: int

    @property
    def is_small(self) -> bool:
        """Whether it is copied without being asked whether it changed."""
        return self.values.numel() <= SMALL

    @property
    def mark(self) -> tuple[int, int]:
        """What ``mark_of`` said of the tensor when it was copied; for a plain tensor."""
        return self.memory.data_ptr(), self.version

    def place(self) -> Tensor:
        """Give the tensor its former memory, also if a forward replaced it; return where its values go."""
        tensor, memory, values = self.tensor, self.memory, self.values
        if (
            tensor.shape == values.shape
            and tensor.dtype is values.dtype
            and (type(tensor) not in PLAIN_TENSORS or tensor.data_ptr() == memory.data_ptr())
        ):
            # Where nothing has counted as a write, this does not either: a graph that needs the values stays usable.
            return tensor.data if tensor._version == self.version else tensor
        tensor.data = memory
        return memory


def copies_of(tensors: Iterable[Tensor]) -> list[TensorCopy]:
    """Return copies of tensors.

    Args:
        tensors: What to copy, each once.
    """
    with torch.no_grad():
        return [TensorCopy(tensor, tensor.data, tensor.clone(), tensor._version) for tensor in tensors]


def put_back_values(copies: Iterable[TensorCopy]) -> None:
    """Give every tensor that was copied its memory and values back.

    Args:
        copies: What ``copies_of`` returned.
    """
    with torch.no_grad():
        places, values = [], []
        for copy in copies:
            if copy.tensor.is_nested:
                copy.tensor.copy_(copy.values)
            elif copy.tensor.is_conj() or copy.tensor.is_neg():  # which the function for many tensors refuses
                copy.place().copy_(copy.values)
            elif copy.tensor.layout is torch.strided:
                places.append(copy.place())
                values.append(copy.values)
            else:
                copy.tensor.data = copy.values.clone()
        if places:
            torch._foreach_copy_(places, values)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor can be copied, and put back, by its memory.

    Args:
        tensor: Any tensor.
    """
    return type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided and not tensor.is_nested


def mark_of(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written into, or gets other memory.

    Args:
        tensor: Any tensor.
    """
    plain = tensor.layout is torch.strided and type(tensor) in PLAIN_TENSORS
    return (tensor.data_ptr() if plain else 0, tensor._version)


def memory_of(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor, which it shares with its views.

    Args:
        tensor: Any tensor.
    """
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else id(tensor)
