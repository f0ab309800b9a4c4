"""Tensors that share one treatment: the unit of work of every kernel."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from samopt.parts.geometry import Metric

__all__ = ["Backup", "Block", "Lengths", "NoiseSource", "Saved", "Stride"]

_LARGEST = torch.finfo(torch.float32).max


class NoiseSource(Protocol):
    """Numbers uniform in [0, 1) for stochastic rounding."""

    def __call__(self, like: Tensor) -> Tensor:
        """Return some, shaped and placed like ``like``."""

    def key(self) -> int:
        """Return 64 bits for a kernel that makes its own, others at each call."""


@dataclass(frozen=True)
class Block:
    """Weights of one device, dtype, metric and parameter group, with the direction of each.

    Attributes:
        weights: Parameters to move.
        directions: Uphill directions, one per weight, of its shape; all of one dtype, all dense or all sparse COO, and
            either all laid out in memory as their weights are, without gaps, or none.
        metric: The metric ``T``; None is the identity.
        eta: The metric's stabiliser.
        linf: True for the l-infinity ball, False for the l2 ball.
        quiet: Whether autograd is not to notice: the move is undone, and repeated, around one and the same graph.
    """

    weights: list[Tensor]
    directions: list[Tensor]
    metric: Metric | None
    eta: float
    linf: bool
    quiet: bool = False

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each weight."""
        return list(map(Tensor.numel, self.weights))

    @functools.cached_property
    def largest(self) -> int:
        """Number of elements of the largest weight; 0 without weights."""
        return max(self.sizes, default=0)

    @functools.cached_property
    def are_vectors(self) -> bool:
        """Whether every weight has one dimension."""
        return {1}.issuperset(map(Tensor.dim, self.weights))

    def without_metric(self) -> Block:
        """Return the same tensors under the identity metric."""
        return replace(self, metric=None)

    def behind_autograd(self) -> Block:
        """Return the same memory, in tensors whose writes autograd does not notice."""
        weights = [weight.data for weight in self.weights]
        return Block(weights, self.directions, self.metric, self.eta, self.linf, self.quiet)


@dataclass(frozen=True)
class Backup:
    """Values to write back into ``weight`` (into its ``rows`` only, where the direction was sparse)."""

    weight: Tensor
    rows: tuple[Tensor, ...] | None
    values: Tensor


@dataclass
class Saved:
    """What puts a block back, made before anything of it is written.

    Attributes:
        backups: One for each weight, in the block's order; empty where a backend saves in another form.
    """

    backups: list[Backup]


@dataclass(frozen=True)
class Lengths:
    """Norms of what is about to move, each 0-dim, on its device.

    Attributes:
        norm: ``||T d||_2`` over everything.
        plain: ``||d||_2`` over everything; None where that would take another read.
        zero: ``norm`` times 0, which is nan where it is not finite; None where nobody has it yet.
        blocks: ``||T d||_2`` over each block.
    """

    norm: Tensor
    plain: Tensor | None
    zero: Tensor | None
    blocks: list[Tensor]


@dataclass(frozen=True)
class Stride:
    """How far uphill to go.

    Attributes:
        norm: ``||T d||_2`` over everything that moves, 0-dim; 0 and what is not finite move nothing.
        radius: The radius ``r``, a number or a 0-dim tensor.
        sign: 1, or -1 to go downhill.
        linf: Whether the ball is the l-infinity one.
    """

    norm: Tensor
    radius: float | Tensor
    sign: int
    linf: bool

    def scale(self, device: torch.device) -> Tensor:
        """Return the factor of ``T^2 d`` (l2) or ``T sign(d)`` (l-infinity): 0 where the norm cannot be used.

        Args:
            device: Where to.
        """
        norm, radius = self.norm, self.radius
        usable = torch.isfinite(norm) & (norm > 0)
        if isinstance(radius, Tensor):
            radius = radius.to(device=norm.device, dtype=norm.dtype, non_blocking=True)
        size = radius * torch.ones_like(norm) if self.linf else radius / norm
        scale = torch.where(usable, self.sign * size, torch.zeros_like(norm)).clamp(-_LARGEST, _LARGEST)
        return scale.to(device, non_blocking=True)

    def factor(self) -> float:
        """Return what ``scale`` does, as a number; waits for the device of the norm."""
        norm, radius = float(self.norm), float(self.radius)
        if not 0 < norm < math.inf:
            return 0.0
        factor = self.sign * (radius if self.linf else radius / norm)
        return factor if math.isnan(factor) else min(max(factor, -_LARGEST), _LARGEST)
