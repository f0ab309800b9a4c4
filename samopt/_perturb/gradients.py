"""Questions about the gradients of parameter groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samopt.distributed import local_part

__all__ = ["Taken", "any_nonzero", "dense_gradients", "poison"]


class Taken(NamedTuple):
    """Parameters, and what the gradient of each is or was."""

    parameters: list[Tensor]
    gradients: list[Tensor | None]

    @classmethod
    def of(cls, parameters: list[Tensor]) -> Taken:
        """Return parameters with their present gradients.

        Args:
            parameters: The parameters.
        """
        return cls(parameters, [parameter.grad for parameter in parameters])

    def clear(self) -> None:
        """Take the gradients away from the parameters."""
        for parameter in self.parameters:
            parameter.grad = None

    def put_back(self) -> None:
        """Give every parameter the gradient that it had."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def forget(self) -> None:
        """Let go of everything."""
        self.parameters.clear()
        self.gradients.clear()


def any_nonzero(groups: list[dict[str, Any]]) -> bool:
    """Return whether any gradient has a non-zero entry; waits for the device.

    Args:
        groups: Parameter groups.
    """
    return any(bool(_entries(gradient).count_nonzero()) for gradient in _gradients(groups))


def dense_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one, to be written into: this rank's part of each.

    A sharded gradient that waits to be summed, or lies otherwise than its parameter, is replaced by one that does not.

    Args:
        parameters: The parameters.

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


def poison(zero_or_nan: Tensor, groups: list[dict[str, Any]]) -> None:
    """Make one entry of the gradients nan where the first pass's were not finite, without asking the device.

    The base optimizer, or a ``GradScaler`` before it, then meets a non-finite gradient as it would have without us.

    Args:
        zero_or_nan: 0-dim tensor: nan if they were not, else 0.
        groups: Parameter groups, with the second pass's gradients.
    """
    values = next((entries for gradient in _gradients(groups) if (entries := _entries(gradient)).numel()), None)
    if values is None:
        return
    first_entry = values[(slice(0, 1),) * values.dim()]
    with torch.no_grad():
        first_entry.add_(zero_or_nan.to(values.device, non_blocking=True))


def _gradients(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    return (p.grad for group in groups for p in group["params"] if p.grad is not None)


def _entries(gradient: Tensor) -> Tensor:
    gradient = local_part(gradient)
    return (gradient._values() if gradient.is_sparse else gradient).detach()
