"""Random numbers for a purpose, apart from every global stream."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["seed_of", "stream"]


def stream(device: torch.device, *key: int | str) -> torch.Generator:
    """Return a fresh generator; equal keys give equal numbers on devices of one type.

    Args:
        device: Where it draws.
        *key: What the numbers are for: a seed and what tells this draw from others.
    """
    return torch.Generator(device).manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """Return a seed of 56 bits that depends on the key alone.

    Args:
        *key: As for ``stream``.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
