"""A separate random stream for every purpose, so that no choice depends on how many draws came before."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["stream", "stream_seed"]


def stream_seed(seed: int, purpose: str) -> int:
    """Return the seed of the stream for ``purpose``, in [0, 2^32)."""
    return int.from_bytes(hashlib.sha256(f"{purpose}: {seed}".encode()).digest()[:4], "big")


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return a new generator for ``purpose``."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose))
