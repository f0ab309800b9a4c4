"""Random numbers for a purpose, apart from every global stream."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["stream"]


def stream(device: torch.device, *key: int | str) -> torch.Generator:
    """Return a fresh generator; equal keys give equal numbers on devices of one type.

    Args:
        device: Where it draws.
        *key: What the numbers are for: a seed and what tells this draw from others.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
