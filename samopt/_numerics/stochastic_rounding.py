"""Seeded numbers for stochastic rounding and random directions, apart from every global random stream."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Noise", "RoundingNoise"]

_STRIDE = 0x9E3779B97F4A7C15  # odd, so that neighbouring seeds do not share streams
_STREAM_STRIDE = 0xD1B54A32D192ED03  # odd, so that the streams of one ascent are no other ascent's


class Noise:
    """Uniform numbers for one ascent: each call, of either kind, goes on where the last one ended.

    Args:
        seed: Where the numbers begin.
        stream: Which of the independent streams from there; replicas of a shard share one.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._seed = seed
        self._stream = stream
        self._generators: dict[torch.device, torch.Generator] = {}
        self._streams: dict[int, Noise] = {}
        self._keys = 0

    def __call__(self, like: Tensor) -> Tensor:
        """Return fp32 numbers in [0, 1), shaped and placed like ``like``."""
        return torch.rand(like.shape, generator=self._on(like.device), device=like.device, dtype=torch.float32)

    def normal(self, like: Tensor) -> Tensor:
        """Return numbers of mean 0 and variance 1, shaped and placed like ``like``, in at least fp32."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.randn(like.shape, generator=self._on(like.device), device=like.device, dtype=wide)

    def key(self) -> int:
        """Return 64 bits for a kernel that makes its own numbers."""
        self._keys += 1
        return _mixed(_mixed(self._seed + self._stream * _STREAM_STRIDE) + self._keys)

    def on_stream(self, stream: int) -> Noise:
        """Return the same ascent's numbers on another stream.

        Args:
            stream: Which.
        """
        return self._streams.setdefault(stream, Noise(self._seed, stream))

    def _on(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self._generators:
            seed = (self._seed + self._stream * _STREAM_STRIDE) % 2**63
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]


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
        return Noise(self._seed * _STRIDE + self.position)


def _mixed(value: int) -> int:
    """Return 64 bits that all depend on all bits of ``value`` (Steele et al. 2014, the output step of SplitMix)."""
    value = (value + _STRIDE) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31
