"""Which values are kept in too few bits to compute with."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["full_precision", "is_low_precision", "widen"]


@contextmanager
def full_precision(*device_types: str) -> Generator[None]:
    """Compute without autocast in this context.

    ``torch.autocast(enabled=False)`` also counts how deep its contexts are, and drops its low-precision copies of the
    weights at depth 0. An interrupt beside its first or last line leaves that count too high for the rest of the
    process, and later steps would use stale copies. This sets the flags alone, and an autocast context around it puts
    them back in any case.

    Args:
        device_types: Such as "cpu".
    """
    before = [(kind, torch.is_autocast_enabled(kind)) for kind in device_types if torch.amp.is_autocast_available(kind)]
    for kind, _ in before:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind, was_enabled in before:
            torch.set_autocast_enabled(kind, was_enabled)


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
