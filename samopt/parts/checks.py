"""Checks of the numbers that parts and parameter groups hold."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_nonnegative"]


def _is_on_host(value: Tensor) -> bool:
    """Return whether a tensor can be read without waiting for a device."""
    return value.is_cpu


def check_nonnegative(name: str, value: Any, where: str = "") -> None:
    """Raise unless ``value`` is a finite real number >= 0, or a 0-dim tensor of one.

    Tensors on the CPU are read. Tensors on an accelerator are not, because reading one waits for the device.

    Args:
        name: Name of the option, for the message.
        value: Its value.
        where: Where it stands, for the message.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative, infinite or nan, or a tensor with several elements.
    """
    if type(value) is float and 0 <= value < math.inf:
        return
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype is torch.bool or value.is_complex():
            raise ValueError(
                f"{name} must be one real number, got a {value.dtype} tensor of shape {tuple(value.shape)}{where}"
            )
        if not _is_on_host(value):
            return
        value = value.item()
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}{where}")
    if not 0 <= float(value) < math.inf:
        fix = "; use rho=0 to disable the ascent" if "rho" in name else ""
        raise ValueError(f"{name} must be >= 0 and finite, got {value}{where}{fix}")
