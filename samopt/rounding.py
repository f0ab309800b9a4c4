"""Seeded uniform numbers for stochastic rounding, apart from every global random stream."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Noise", "RoundingNoise"]

_STRIDE = 0x9E3779B97F4A7C15  # odd, so that neighbouring seeds do not share streams
_STREAM_STRIDE = 0xD1B54A32D192ED03  # odd, so that the streams of one ascent are no other ascent's


class Noise(Protocol):
    """Uniform numbers for one ascent."""

    def __call__(self, like: Tensor, stream: int = 0) -> Tensor:
        """Return fp32 numbers in [0, 1), shaped and placed like ``like``, independent between streams."""


class RoundingNoise:
    """A stream of streams: one independent generator for each ascent.

    Equal seeds and positions give equal numbers, so replicas agree and a resumed run continues exactly.

    Args:
        seed: Which stream of streams.

    Attributes:
        position: Which ascent's numbers ``source`` gives; the only state.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.position = 0

    def advance(self) -> None:
        """Go on to the next ascent's numbers."""
        self.position += 1

    def next(self) -> Noise:
        """Advance, and return the new ascent's source."""
        self.advance()
        return self.source()

    def source(self) -> Noise:
        """Return this ascent's source."""
        seed = self._seed * _STRIDE + self.position
        generators: dict[tuple[torch.device, int], torch.Generator] = {}

        def uniform(like: Tensor, stream: int = 0) -> Tensor:
            key = like.device, stream
            if key not in generators:
                own_seed = (seed + stream * _STREAM_STRIDE) % 2**63
                generators[key] = torch.Generator(like.device).manual_seed(own_seed)
            return torch.rand(like.shape, generator=generators[key], device=like.device, dtype=torch.float32)

        return uniform
