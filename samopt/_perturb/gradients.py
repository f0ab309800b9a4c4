"""Stash, restore and flag gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samopt._numerics.devices import to_device
from samopt.distributed import local_part

__all__ = ["StashedGradients", "any_nonzero", "dense_gradients", "propagate_nonfinite"]


class StashedGradients(NamedTuple):
    """Parameters, and the gradient that each had."""

    parameters: list[Tensor]
    gradients: list[Tensor | None]

    @classmethod
    def of(cls, parameters: list[Tensor]) -> StashedGradients:
        """Return parameters with their present gradients."""
        return cls(parameters, [parameter.grad for parameter in parameters])

    def clear(self) -> None:
        """Set the gradients of the parameters to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def put_back(self) -> None:
        """Give every parameter the gradient that it had."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def release(self) -> None:
        """Drop the references to the parameters and the gradients."""
        self.parameters.clear()
        self.gradients.clear()


def any_nonzero(groups: list[dict[str, Any]]) -> bool:
    """Return whether any gradient has a non-zero entry; waits for the device."""
    return any(bool(_entries(gradient).count_nonzero()) for gradient in _gradients(groups))


def dense_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one, to be written into: this rank's part of each.

    A sharded gradient whose placement differs from its parameter's, one that waits to be summed say, is redistributed.

    Raises:
        ValueError: If a gradient is sparse.
    """
    gradients = []
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"the gradients of two passes are combined entry by entry, but one is {gradient.layout}; use "
                "sparse=False in the embedding"
            )
        placements = getattr(parameter, "placements", None)
        if placements is not None and gradient.placements != placements:
            gradient = parameter.grad = gradient.redistribute(placements=placements)
        gradients.append(local_part(gradient).detach())
    return gradients


def propagate_nonfinite(nonfinite_flag: Tensor, groups: list[dict[str, Any]]) -> None:
    """Make one entry of the gradients nan where those of the first pass were not finite, without asking the device.

    The base optimizer, or a ``GradScaler`` before it, then finds a gradient that is not finite, as it would have in
    one pass.

    Args:
        nonfinite_flag: 0-dim tensor: nan if they were not finite, else 0.
        groups: Parameter groups, with the gradients of the second pass.
    """
    values = next((entries for gradient in _gradients(groups) if (entries := _entries(gradient)).numel()), None)
    if values is None:
        return
    first_entry = values[(slice(0, 1),) * values.dim()]
    with torch.no_grad():
        first_entry.add_(to_device(nonfinite_flag, values.device))


def _gradients(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Yield the gradients that there are."""
    return (p.grad for group in groups for p in group["params"] if p.grad is not None)


def _entries(gradient: Tensor) -> Tensor:
    """Return the values of a gradient on this rank; of a sparse one, those that it stores."""
    gradient = local_part(gradient)
    return (gradient._values() if gradient.is_sparse else gradient).detach()
