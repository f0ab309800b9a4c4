"""What a kernel works on: tensors that share one treatment, their norms, and the size of the step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from samopt._numerics.devices import to_device
from samopt.parts.geometry import Geometry

__all__ = ["Block", "NoiseSource", "Norms", "StepSize"]

_LARGEST = torch.finfo(torch.float32).max


class NoiseSource(Protocol):
    """Numbers uniform in [0, 1) for stochastic rounding."""

    def __call__(self, like: Tensor) -> Tensor:
        """Return numbers of the shape and on the device of ``like``."""

    def key(self) -> int:
        """Return 64 bits for a kernel that makes its own numbers; every call returns other bits."""


@dataclass(frozen=True)
class Block:
    """Weights of one device, dtype, geometry and parameter group, with the direction of each.

    Attributes:
        weights: Parameters to move.
        directions: Uphill directions, one per weight, of its shape; all of one dtype, all dense or all sparse COO, and
            either all with the memory layout of their weights, without gaps, or none.
        geometry: ``T``; None is the identity.
        eta: The stabiliser of the geometry.
        linf: True for the l-infinity ball, False for the l2 ball.
        scales: What makes ``T`` of each weight, where ``geometry`` knows it from the base optimizer's state.
    """

    weights: list[Tensor]
    directions: list[Tensor]
    geometry: Geometry | None
    eta: float
    linf: bool
    scales: list[Callable[[], Tensor]] | None = None

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each weight."""
        return list(map(Tensor.numel, self.weights))

    def without_geometry(self) -> Block:
        """Return the same tensors with ``T = 1``."""
        return replace(self, geometry=None, scales=None)

    def scale(self, index: int, weight: Tensor, direction: Tensor, rows: tuple[Tensor, ...] | None) -> Tensor | None:
        """Return ``T`` of a weight; None for ``T = 1``.

        Args:
            index: Which weight.
            weight: Its values in at least fp32, at ``rows``.
            direction: Likewise.
            rows: The rows that move; None is all of them.
        """
        if self.geometry is None:
            return None
        if self.scales is None:
            return self.geometry.scale(weight, direction, self.eta)
        known = self.scales[index]()
        return known if rows is None else known[rows]


class Norms(NamedTuple):
    """Norms of what is about to move, each 0-dim, on its device.

    Attributes:
        norm: ``||T d||_2`` over everything.
        plain: ``||d||_2`` over everything; None where that would take another read.
        nonfinite_flag: 0, or nan where ``norm`` is not finite; None where the backend does not compute it.
        blocks: ``||T d||_2`` over each block.
    """

    norm: Tensor
    plain: Tensor | None
    nonfinite_flag: Tensor | None
    blocks: list[Tensor]


class StepSize(NamedTuple):
    """How far to move: ``epsilon = scale T^2 d`` (l2) or ``scale T sign(d)`` (l-infinity).

    Attributes:
        norm: ``||T d||_2`` over everything that moves, 0-dim; where it is 0 or not finite, nothing moves.
        radius: The radius ``r``, a number or a 0-dim tensor.
        sign: 1, or -1 to go downhill.
        linf: Whether the ball is the l-infinity one.
    """

    norm: Tensor
    radius: float | Tensor
    sign: int
    linf: bool

    def scale(self, device: torch.device) -> Tensor:
        """Return ``r / norm`` (l2) or ``r`` (l-infinity) with its sign, 0-dim on ``device``; 0 where nothing moves."""
        norm, radius = self.norm, self.radius
        usable = torch.isfinite(norm) & (norm > 0)
        if isinstance(radius, Tensor):
            radius = to_device(radius, norm.device, norm.dtype)
        size = radius * torch.ones_like(norm) if self.linf else radius / norm
        scale = torch.where(usable, self.sign * size, torch.zeros_like(norm)).clamp(-_LARGEST, _LARGEST)
        return to_device(scale, device)

    def factor(self) -> float:
        """Return ``scale`` as a number; waits for the device of the norm."""
        norm, radius = float(self.norm), float(self.radius)
        if not 0 < norm < math.inf:
            return 0.0
        factor = self.sign * (radius if self.linf else radius / norm)
        return factor if math.isnan(factor) else min(max(factor, -_LARGEST), _LARGEST)

    def asked(self, length: Tensor) -> Tensor:
        """Return the norm that the move of a block has before rounding, 0-dim.

        Args:
            length: ``||T d||_2`` of the block, 0-dim.
        """
        return self.scale(length.device).abs() * (length > 0 if self.linf else length.nan_to_num(0, 0, 0))
