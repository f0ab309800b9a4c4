"""Weights that go to many places, one after the other, and return."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from samopt import kernels
from samopt._numerics.stochastic_rounding import Noise
from samopt._perturb.weight_backup import SavedWeights
from samopt.kernels import Block, StepSize

__all__ = ["MovableWeights"]


class MovableWeights:
    """Weights that are saved once, moved as often as needed, and put back bit for bit.

    Memory: one copy of the weights.

    Args:
        weights: Leaf tensors; values are written into them.

    Attributes:
        origin: The saved values, one tensor for each weight.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self.origin = [weight.detach().clone() for weight in self._weights]
        with torch.no_grad():
            self._saved = [SavedWeights.of([w], [o]) for w, o in zip(self._weights, self.origin, strict=True)]

    def put(self, index: int, values: Tensor) -> None:
        """Write ``values`` into a weight.

        Args:
            index: Which weight.
            values: Of its shape.
        """
        with torch.no_grad():
            self._weights[index].copy_(values)

    def move(self, index: int, offset: Tensor, noise: Noise | None = None) -> None:
        """Write ``origin + offset`` into a weight, computed in at least fp32.

        Args:
            index: Which weight.
            offset: Of its shape.
            noise: As for ``Perturbation.move``.
        """
        weight = self._weights[index]
        block = Block([weight], [offset], None, 0.0, False)
        self.put(index, self.origin[index])
        with torch.no_grad():
            wide = torch.float32 if weight.device.type == "mps" else torch.float64
            one = torch.ones((), dtype=wide, device=weight.device)
            kernels.select(block, "auto").ascend(block, StepSize(one, 1.0, 1, False), one, noise, into=None)

    def undo(self) -> None:
        """Write every saved weight back, bit for bit; may be called any number of times."""
        with torch.no_grad():
            for saved in reversed(self._saved):
                saved.restore()
