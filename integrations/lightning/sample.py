"""The first examples of a run's data, kept to measure on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from samopt.sharpness._measuring.batches import map_tensors

from .._second_pass.batch_copies import independent_copy

__all__ = ["Sample"]


class Sample:
    """Gathers whole batches as they go by, until there are enough examples.

    Args:
        examples: How many are enough, >= 1.
    """

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._count = 0
        self.batches: list[Any] = []
        self.is_complete = False

    def begin(self) -> None:
        """Start from nothing, at the start of the data, unless there are enough already."""
        if not self.is_complete:
            self.batches, self._count = [], 0

    def add(self, batch: Any) -> None:
        """Keep a copy of a batch, unless there are enough.

        Args:
            batch: As the step gets it.
        """
        if not self.is_complete:
            self.batches.append(independent_copy(batch))
            self._count += _size(batch)
            self.is_complete = self._count >= self._examples

    def end(self) -> None:
        """Be content with what there is, at the end of the data."""
        self.is_complete = bool(self.batches)


def _size(batch: Any) -> int:
    """Return the number of examples, the length of the first tensor that has one; 1 where there is none."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() > 0:
            sizes.append(len(tensor))
        return tensor

    map_tensors(batch, note)
    return sizes[0] if sizes else 1
