"""Seeded uniform numbers for stochastic rounding, apart from every global random stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RoundingNoise"]

_STRIDE = 0x9E3779B97F4A7C15  # odd, so that neighbouring seeds do not share streams


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

    def next(self) -> Callable[[Tensor], Tensor]:
        """Advance, and return the new ascent's source."""
        self.advance()
        return self.source()

    def source(self) -> Callable[[Tensor], Tensor]:
        """Return this ascent's source: from a tensor to fp32 numbers in [0, 1), shaped and placed like it."""
        seed = (self._seed * _STRIDE + self.position) % 2**63
        generators: dict[torch.device, torch.Generator] = {}

        def uniform(like: Tensor) -> Tensor:
            device = like.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            return torch.rand(like.shape, generator=generators[device], device=device, dtype=torch.float32)

        return uniform
