"""The l2 norm of a tensor, safe where squares overflow or vanish."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["vector_norm"]


def vector_norm(values: Tensor) -> Tensor:
    """Return the l2 norm of ``values`` as a 0-dim fp64 tensor (fp32 where the device has no fp64).

    Squares are accumulated in fp64, where no square of a finite fp32 value overflows or vanishes; fp64 values are
    divided by their largest magnitude first.
    """
    if values.numel() == 0:
        return torch.zeros((), dtype=_wide(values.device), device=values.device)
    if values.dtype in (torch.float64, torch.complex128) or _wide(values.device) is not torch.float64:
        peak = values.abs().amax()
        usable = torch.isfinite(peak) & (peak > 0)
        unit = torch.where(usable, peak, torch.ones_like(peak))
        return torch.where(usable, peak * torch.linalg.vector_norm(values / unit), peak)
    wide = torch.complex128 if values.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide)
    return norm


def _wide(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64
