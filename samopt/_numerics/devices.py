"""Numbers that go to another device without a wait of the host."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return values on a device; the host waits only where they go to the CPU.

    Operations on an accelerator run after the copy to it. Those on the CPU do not: they would read memory that the
    copy has not reached yet.

    Args:
        values: A tensor on any device.
        device: The device that computes with them next.
        dtype: The dtype there; None keeps it.
    """
    return values.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
