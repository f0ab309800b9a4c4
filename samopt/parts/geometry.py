"""Which directions count as equally long: the elementwise geometry T of a perturbation."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Adaptive", "Euclidean", "Fisher", "Geometry"]


@runtime_checkable
class Geometry(Protocol):
    """An elementwise, positive diagonal scaling ``T`` of weight space.

    The ascent of every optimizer here is ``r T^2 d / ||T d||_2`` (l2) or ``r T sign(d)`` (l-infinity), so a geometry
    answers one question: what is ``T`` for this tensor?
    """

    @property
    def name(self) -> str:
        """A short identifier; backends with a fused form of the geometry look it up by this name."""

    def applies_to(self, weight: Tensor) -> bool:
        """Whether ``weight`` uses this geometry; where it does not, ``T = 1``."""

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``T``, real, shaped like ``weight``, in the dtype of ``weight`` (its real dtype where complex)."""


class Euclidean:
    """``T = 1``: the ball of SAM (Foret et al. 2021, equation 2)."""

    name = "euclidean"

    def applies_to(self, weight: Tensor) -> bool:
        """Return True: the identity applies everywhere."""
        return True

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ones."""
        return torch.ones_like(weight.abs())


class Adaptive:
    """``T = |w| + eta``: the scale-invariant ball of ASAM (Kwon et al. 2021, algorithm 1).

    Tensors of at most one dimension (biases, the scales of norm layers) keep ``T = 1``, as in the paper's experiments.
    """

    name = "adaptive"

    def applies_to(self, weight: Tensor) -> bool:
        """Return whether ``weight`` has more than one dimension."""
        return weight.dim() > 1

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``|w| + eta``."""
        return weight.abs().add_(eta)


class Fisher:
    """``T = (1 + eta d^2)^(-1/2)``: the diagonal empirical Fisher ball of Fisher SAM (Kim et al. 2022, equation 9)."""

    name = "fisher"

    def applies_to(self, weight: Tensor) -> bool:
        """Return True: the Fisher geometry applies everywhere."""
        return True

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``1 / sqrt(1 + eta |d|^2)``."""
        length = direction.abs().mul_(eta**0.5)
        return torch.hypot(length, torch.ones_like(length)).reciprocal_()  # the square of 1e30 would overflow
