"""What an ascent moves: weights and directions, with the ball of each parameter group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

__all__ = ["Radius", "Region", "Targets"]

Radius: TypeAlias = float | Tensor | Callable[[Tensor], Tensor]
"""A number; a 0-dim tensor; or what makes one of ``||T d||_2``. Tensors are never read on the host."""


@dataclass(frozen=True)
class Region:
    """The ball that one parameter group's weights may move in.

    Attributes:
        radius: Its radius ``r``.
        eta: Stabiliser of the geometry.
        sign: 1 to move along the directions, -1 to move against them, as where a group is maximised.
    """

    radius: Radius
    eta: float
    sign: int

    def radius_at(self, norm: Tensor) -> float | Tensor:
        """Return the radius.

        Args:
            norm: ``||T d||_2`` over every target.
        """
        return self.radius(norm) if callable(self.radius) else self.radius


class Targets(NamedTuple):
    """Weights that move in one region, with the direction of each.

    Attributes:
        region: The ball.
        weights: What moves.
        directions: Along what, for each weight.
        scales: What makes ``T`` of each weight's local part, where the geometry knows it from the base's state.
    """

    region: Region
    weights: list[Tensor]
    directions: list[Tensor]
    scales: list[Callable[[], Tensor]] | None = None
