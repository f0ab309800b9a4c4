"""Tensors that are kept for parameters, as a checkpoint holds them: by the parameter's place, not by its identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["by_parameter", "in_order"]


def in_order(kept: Mapping[Tensor, Tensor], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what is kept for each parameter, None where there is nothing.

    Args:
        kept: Tensors by parameter.
        parameters: Every parameter, in the order of the groups.
    """
    return [kept.get(parameter) for parameter in parameters]


def by_parameter(saved: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Return copies of what ``in_order`` returned, each on its parameter's device.

    Args:
        saved: Tensors in the order of ``parameters``; there may be fewer.
        parameters: Every parameter, in the order of the groups.
    """
    return {
        parameter: tensor.detach().clone().to(parameter.device)
        for parameter, tensor in zip(parameters, saved, strict=False)
        if tensor is not None
    }
