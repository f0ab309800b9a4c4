"""The set of perturbations that a sharpness is taken over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from samopt._numerics.low_precision import widen
from samopt.parts.checks import check_nonnegative
from samopt.sharpness._measuring.optimizer_parts import (
    Adaptive,
    Euclidean,
    Geometry,
    Perturbation,
    Region,
    Targets,
    vector_norm,
)

__all__ = ["AdaptiveOption", "Ball"]

AdaptiveOption = bool | Literal["asam"]
"""False: ``T = 1``. True: ``T = |w| + eta`` for every tensor. "asam": the same, but 1 for tensors of dim <= 1."""


class _AdaptiveEverywhere(Adaptive):
    """``T = |w| + eta`` for every tensor, as Andriushchenko et al. 2023 measure."""

    def applies_to(self, weight: Tensor) -> bool:
        return True


@dataclass(frozen=True)
class Ball:
    """``{T u : ||u||_p <= rho}`` around the weights, with ``p`` 2 or infinity.

    Args:
        rho: Radius, >= 0.
        norm: "l2" or "linf".
        adaptive: the geometry ``T``.
        eta: Added to ``|w|`` in an adaptive geometry, >= 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    rho: float
    norm: str
    adaptive: AdaptiveOption
    eta: float

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise ValueError(f'norm must be "l2" or "linf", got {self.norm!r}')
        if not isinstance(self.adaptive, bool) and self.adaptive != "asam":
            raise ValueError(f'adaptive must be True, False or "asam", got {self.adaptive!r}')
        check_nonnegative("rho", self.rho)
        check_nonnegative("eta", self.eta)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, for a result."""
        return {"rho": self.rho, "norm": self.norm, "adaptive": self.adaptive, "eta": self.eta}

    @property
    def linf(self) -> bool:
        """Whether ``p`` is infinity."""
        return self.norm == "linf"

    @property
    def geometry(self) -> Geometry:
        """The geometry, as an optimizer has it."""
        if not self.adaptive:
            return Euclidean()
        return Adaptive() if self.adaptive == "asam" else _AdaptiveEverywhere()

    def lengths(self, weight: Tensor) -> Tensor | None:
        """Return ``T`` at a weight, in at least fp32, or None for 1.

        Args:
            weight: The weight at the centre.
        """
        geometry = self.geometry
        if not self.adaptive or not geometry.applies_to(weight):
            return None
        wide = widen(weight)
        return geometry.scale(wide, wide, self.eta)

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Return random numbers: normal in l2, uniform in the unit interval around 0 (complex: the unit disc) in linf.

        Args:
            like: Of its shape and device, and in at least fp32.
            generator: What draws.
        """
        dtype = widen(like).dtype
        if not self.linf:
            return torch.randn(like.shape, generator=generator, device=like.device, dtype=dtype)
        if not dtype.is_complex:
            return torch.rand(like.shape, generator=generator, device=like.device, dtype=dtype).mul_(2).sub_(1)
        shape = (2, *like.shape)
        square, turn = torch.rand(shape, generator=generator, device=like.device, dtype=dtype.to_real())
        return torch.polar(square.sqrt(), 2 * math.pi * turn)

    def first_step(self, weights: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> Perturbation:
        """Return SAM's ascent, to the ball's first-order worst point.

        Args:
            weights: The weights, at the centre.
            gradient: Their gradient; those without one do not move.
        """
        moving = [w for w, g in zip(weights, gradient, strict=True) if g is not None]
        targets = Targets(Region(self.rho, self.eta, 1), moving, [g for g in gradient if g is not None])
        with torch.no_grad():
            return Perturbation([targets], self.geometry, linf=self.linf)

    def uphill(self, offsets: list[Tensor], centre: Sequence[Tensor], size: float) -> float:
        """Turn a gradient, in place, into the steepest step of a size: ``size T^2 g / ||T g||`` or ``size T sign(g)``.

        Args:
            offsets: The gradient; overwritten.
            centre: The weights at the centre.
            size: Length of the step, in the ball's norm.

        Returns:
            The gradient's norm ``||T g||_2``. Where it is 0 or not finite, nothing is uphill, and nothing was done.
        """
        steepness = []
        for g, w in zip(offsets, centre, strict=True):
            if (t := self.lengths(w)) is not None:
                g.mul_(t)
            steepness.append(vector_norm(g))
        norm = float(vector_norm(torch.stack([length.to(steepness[0]) for length in steepness])))
        if not 0 < norm < float("inf"):
            return norm
        for g, w in zip(offsets, centre, strict=True):
            t = self.lengths(w)
            if self.linf:
                g.copy_(torch.sgn(g))
            g.mul_(size if self.linf else size / norm)
            if t is not None:
                g.mul_(t)
        return norm

    def project(self, offsets: Sequence[Tensor], centre: Sequence[Tensor]) -> None:
        """Bring a perturbation back into the ball, in place.

        Args:
            offsets: The perturbation.
            centre: The weights at the centre.
        """
        if self.linf:
            for offset, w in zip(offsets, centre, strict=True):
                t = self.lengths(w)
                size = offset.abs()
                limit = torch.full_like(size, self.rho) if t is None else t.mul_(self.rho)
                offset.mul_(torch.where(size > limit, limit / size, 1.0))
            return
        lengths = [vector_norm(self._without_geometry(offset, w)) for offset, w in zip(offsets, centre, strict=True)]
        norm = float(vector_norm(torch.stack([length.to(lengths[0]) for length in lengths])))
        if norm > self.rho:
            for offset in offsets:
                offset.mul_(self.rho / norm)

    def _without_geometry(self, offset: Tensor, weight: Tensor) -> Tensor:
        t = self.lengths(weight)
        return offset if t is None else torch.where(t > 0, offset / t, 0.0)
