"""The norm and the ascent over whole lists of tensors: a few launches instead of several per tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from samopt._numerics.vector_norm import vector_norm
from samopt.kernels.block import Block, NoiseSource, StepSize

__all__ = ["ascend", "norm", "supports"]

_GEOMETRIES = {"adaptive"}


def supports(block: Block) -> str | None:
    """Return why the foreach path cannot run ``block``, or None where it can."""
    if block.linf:
        return "the l-infinity ball has no foreach form"
    if block.geometry is not None and block.geometry.name not in _GEOMETRIES:
        return f"the {block.geometry.name} geometry has no foreach form"
    weight, direction = block.weights[0], block.directions[0]
    if direction.layout is not torch.strided:
        return f"a gradient has layout {direction.layout}, not torch.strided"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"a parameter has dtype {weight.dtype}, not float32 or float64"
    if direction.dtype is not weight.dtype:
        return f"a gradient has dtype {direction.dtype}, its parameter {weight.dtype}"
    return None


def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block, accumulated in fp64: a 0-dim fp64 tensor."""
    directions = block.directions
    if block.geometry is not None:
        directions = _adaptive_scale(block)
        torch._foreach_mul_(directions, block.directions)
    if directions[0].dtype is torch.float64 or directions[0].device.type == "mps":
        return vector_norm(torch.stack([vector_norm(direction) for direction in directions]))
    return vector_norm(torch.stack(torch._foreach_norm(directions, 2, dtype=torch.float64)))


def ascend(
    block: Block, step: StepSize, length: Tensor, noise: NoiseSource | None, *, into: list[Tensor] | None = None
) -> None:
    """Write ``w + scale T^2 d`` as ``reference.ascend`` does."""
    targets: list[Tensor] = block.weights
    if into is not None:
        torch._foreach_copy_(into, block.weights)
        targets = into
    uphill = block.directions
    if block.geometry is not None:
        uphill = _adaptive_scale(block)
        torch._foreach_mul_(uphill, uphill)
        torch._foreach_mul_(uphill, block.directions)
    if step.norm.is_cpu:
        if (factor := step.factor()) != 0:
            torch._foreach_add_(targets, uphill, alpha=factor)
        return
    scale = step.scale(uphill[0].device).to(uphill[0].dtype)  # stays on the device: reading it would wait
    zero = torch.zeros((), dtype=scale.dtype, device=scale.device)
    moves = [torch.where(scale != 0, move, zero) for move in torch._foreach_mul(uphill, scale)]
    torch._foreach_add_(targets, moves)


def _adaptive_scale(block: Block) -> list[Tensor]:
    """Return the adaptive geometry's ``T = |w| + eta`` in new memory."""
    scales = list(torch._foreach_abs(block.weights))
    torch._foreach_add_(scales, block.eta)
    return scales
