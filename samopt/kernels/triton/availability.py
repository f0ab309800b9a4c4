"""Whether Triton can run on a device, found out without importing it."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["interprets", "unavailable"]

_CAPABILITY = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """Return why no kernel can run on ``device``, or None where they can.

    Args:
        device: Where the tensors are.
    """
    if not _is_installed():
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        return None if _is_recent(device) else f"{device} has a compute capability below {_CAPABILITY}"
    if device.type == "cpu" and interprets():
        return None
    return f"a parameter is on {device}, not on a CUDA or ROCm device"


def interprets() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU: they are made for it as they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _CAPABILITY
