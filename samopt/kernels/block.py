"""Tensors that share one treatment: the unit of work of every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from samopt.geometry import Metric

__all__ = ["Backup", "Block", "NoiseSource", "Saved"]

NoiseSource: TypeAlias = Callable[[Tensor], Tensor]
"""Returns numbers uniform in [0, 1), shaped and placed like its argument."""


@dataclass(frozen=True)
class Block:
    """Weights of one device, dtype, metric and parameter group, with the direction of each.

    Attributes:
        weights: Parameters to move.
        directions: Uphill directions, one per weight, of its shape; all of one dtype, and dense or sparse COO.
        metric: The metric ``T``; None is the identity.
        eta: The metric's stabiliser.
        linf: True for the l-infinity ball, False for the l2 ball.
    """

    weights: list[Tensor]
    directions: list[Tensor]
    metric: Metric | None
    eta: float
    linf: bool

    def without_metric(self) -> Block:
        """Return the same tensors under the identity metric."""
        return replace(self, metric=None)


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
