"""Stash, restore and flag gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samopt._numerics.devices import to_device
from samopt.distributed import local_part

__all__ = [
    "GradientMarks",
    "StashedGradients",
    "any_nonzero",
    "dense_gradients",
    "in_flat_memory",
    "propagate_nonfinite",
]


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

    def copies(self) -> list[Tensor | None]:
        """Return copies of the gradients."""
        return [None if gradient is None else gradient.detach().clone() for gradient in self.gradients]

    def write(self, values: Sequence[Tensor | None]) -> None:
        """Write values into the gradients.

        Args:
            values: What ``copies`` returned; nothing is written where it is empty.
        """
        with torch.no_grad():
            for gradient, value in zip(self.gradients, values, strict=False):
                if gradient is not None and value is not None:
                    gradient.copy_(value)

    def fill(self) -> None:
        """Write the present gradients of the parameters into the memory of these, and make them the gradients."""
        with torch.no_grad():
            for parameter, former in zip(self.parameters, self.gradients, strict=True):
                present = parameter.grad
                if former is None or present is former:
                    continue
                if present is None:
                    former.zero_()
                elif present.layout is torch.strided and present.data_ptr() == former.data_ptr():
                    continue  # DistributedDataParallel gives its buckets out again
                else:
                    former.copy_(present)
                parameter.grad = former

    def release(self) -> None:
        """Drop the references to the parameters and the gradients."""
        self.parameters.clear()
        self.gradients.clear()


def in_flat_memory(parameters: Sequence[Tensor]) -> StashedGradients:
    """Return the parameters whose gradient is a part of larger memory, such as a flat buffer of all gradients.

    The user's code may read that memory, or divide or clip it as a whole, so gradients have to be there again in the
    end. Those that autograd makes have memory of their own.

    Args:
        parameters: Parameters, with gradients or without.
    """
    found = StashedGradients([], [])
    for parameter in parameters:
        gradient = parameter.grad
        if type(gradient) is Tensor and gradient.layout is torch.strided and gradient._is_view():
            if gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size():
                found.parameters.append(parameter)
                found.gradients.append(gradient)
    return found


class GradientMarks:
    """Tells whether gradients were replaced or written into since it was made.

    Args:
        parameters: Parameters with a gradient.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._before = {p: (p.grad, -1 if p.grad is None else p.grad._version) for p in parameters}

    def is_known(self, parameter: Tensor) -> bool:
        """Return whether a parameter has the very gradient that it had then.

        Args:
            parameter: Any parameter that has a gradient now.
        """
        gradient = parameter.grad
        before, version = self._before.get(parameter, (None, -1))
        return gradient is not None and gradient is before and gradient._version == version

    def changed(self) -> list[Tensor]:
        """Return the parameters with another gradient than then that is not zero; may wait for the device."""
        others = [p for p in self._before if p.grad is not None and not self.is_known(p)]
        return [p for p in others if any_nonzero([{"params": [p]}])]


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
