"""Buffers of a measured model, put back after every evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SavedBuffers"]


class SavedBuffers:
    """The tensor of every buffer of a model, and its values, to be put back where it was registered.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [(module, name, b) for module in model.modules() for name, b in module._buffers.items()]
        self._written = [buffer for _, _, buffer in self._places if buffer is not None and not _is_read_only(buffer)]
        with torch.no_grad():
            self._values = [buffer.clone() for buffer in self._written]

    def restore(self) -> None:
        """Register the same tensors again, where others took their place, and write their values back."""
        for owner, name, buffer in self._places:
            if owner._buffers.get(name) is not buffer:
                owner._buffers[name] = buffer
        with torch.no_grad():
            for buffer, value in zip(self._written, self._values, strict=True):
                buffer.copy_(value)


def _is_read_only(buffer: Tensor) -> bool:
    """Return whether torch refuses to write into the buffer, so that no evaluation can have changed its values."""
    if buffer.is_inference():
        return True
    return buffer.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
