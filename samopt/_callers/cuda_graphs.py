"""Whether the work of a device is recorded into a graph that is replayed later, as CUDA's can be."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["device_module", "is_capturing"]


def is_capturing(device: torch.device) -> bool:
    """Return whether a graph is being captured on the device's present stream.

    What the host does then happens once, whatever the number of replays; random states can be neither read nor set.

    Args:
        device: Any device; the CPU has no graphs.
    """
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    asks = getattr(module, "is_current_stream_capturing", None)
    return asks is not None and bool(asks())


def device_module(device: torch.device) -> Any:
    """Return what ``torch.cuda`` is for CUDA.

    Args:
        device: A device other than the CPU.
    """
    return getattr(torch, device.type)
