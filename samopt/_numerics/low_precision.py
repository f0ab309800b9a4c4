"""Which values are kept in too few bits to compute with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_low_precision", "widen"]


def is_low_precision(values: Tensor) -> bool:
    """Return whether values are bf16 or fp16.

    Args:
        values: A tensor.
    """
    return values.dtype in (torch.bfloat16, torch.float16)


def widen(values: Tensor) -> Tensor:
    """Return values in at least fp32.

    Args:
        values: Of a floating-point or complex dtype.
    """
    return values.float() if is_low_precision(values) else values
