"""Which perturbations count as equally long: the elementwise geometry ``T``."""

from __future__ import annotations

import torch
from torch import Tensor

from samopt.parts.part import Part

__all__ = ["Adaptive", "Euclidean", "Fisher", "Geometry"]


class Geometry(Part):
    """An elementwise, positive, diagonal geometry ``T`` on weight space.

    Every ascent is ``r T^2 d / ||T d||_2`` (l2) or ``r T sign(d)`` (l-infinity), so a geometry answers one question:
    what is ``T`` for this tensor?

    Attributes:
        name: A short identifier. Kernels with a fused form of the geometry look it up by this name.
    """

    name = "custom"

    def applies_to(self, weight: Tensor) -> bool:
        """Return whether ``weight`` uses this geometry, True unless overridden; where it does not, ``T = 1``.

        Args:
            weight: A parameter, or this rank's part of one.
        """
        return True

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``T``: real, of the shape of ``weight``, in its dtype (its real dtype where complex).

        Args:
            weight: The weight, in at least fp32.
            direction: Its direction, likewise.
            eta: The group's stabiliser.
        """
        raise NotImplementedError


class Euclidean(Geometry):
    """``T = 1``: the ball of SAM (Foret et al. 2021, equation 2)."""

    name = "euclidean"

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ones.

        Args:
            weight: The weight.
            direction: Its direction.
            eta: The stabiliser.
        """
        return torch.ones_like(weight.abs())


class Adaptive(Geometry):
    """``T = |w| + eta``: the scale-invariant ball of ASAM (Kwon et al. 2021, algorithm 1).

    Tensors of at most one dimension (biases, the scales of norm layers) keep ``T = 1``, as in the paper's experiments.
    """

    name = "adaptive"

    def applies_to(self, weight: Tensor) -> bool:
        """Return whether ``weight`` has more than one dimension.

        Args:
            weight: A parameter.
        """
        return weight.dim() > 1

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``|w| + eta``.

        Args:
            weight: The weight.
            direction: Its direction.
            eta: The stabiliser.
        """
        return weight.abs().add_(eta)


class Fisher(Geometry):
    """``T = (1 + eta d^2)^(-1/2)``: the diagonal empirical Fisher ball of Fisher SAM (Kim et al. 2022, equation 9)."""

    name = "fisher"

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``1 / sqrt(1 + eta |d|^2)``.

        Args:
            weight: The weight.
            direction: Its direction.
            eta: The stabiliser.
        """
        length = direction.abs().mul_(eta**0.5)
        return torch.hypot(length, torch.ones_like(length)).reciprocal_()  # the square of 1e30 would overflow
