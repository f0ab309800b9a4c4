"""The same operations over whole lists of tensors: a few launches instead of several per tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from samopt.kernels.block import Backup, Block, NoiseSource, Saved
from samopt.kernels.memory import NEW_MEMORY, Spare
from samopt.kernels.reference import vector_norm

__all__ = ["ascend", "norm", "restore", "save", "supports"]

_METRICS = {"adaptive"}


def supports(block: Block) -> str | None:
    """Return why the foreach path cannot run ``block``, or None where it can."""
    if block.linf:
        return "the l-infinity ball has no foreach form"
    if block.metric is not None and block.metric.name not in _METRICS:
        return f"the {block.metric.name} metric has no foreach form"
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
    if block.metric is not None:
        directions = _lengths(block)
        torch._foreach_mul_(directions, block.directions)
    if directions[0].dtype is torch.float64 or directions[0].device.type == "mps":
        return vector_norm(torch.stack([vector_norm(direction) for direction in directions]))
    return vector_norm(torch.stack(torch._foreach_norm(directions, 2, dtype=torch.float64)))


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Saved:
    """Return copies of every weight."""
    values = [weight.detach() for weight in block.weights]
    places = [spare.like(value) for value in values]
    torch._foreach_copy_(places, values)
    return Saved([Backup(weight, None, place) for weight, place in zip(block.weights, places, strict=True)])


def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Saved | None = None) -> None:
    """Write ``w + scale T^2 d``; on the CPU the scale becomes a host number, elsewhere it stays on the device."""
    uphill = block.directions
    if block.metric is not None:
        uphill = _lengths(block)
        torch._foreach_mul_(uphill, uphill)
        torch._foreach_mul_(uphill, block.directions)
    if scale.device.type == "cpu":
        if (step := float(scale)) != 0:
            torch._foreach_add_(block.weights, uphill, alpha=step)
        return
    step_tensor = scale.to(uphill[0].dtype)
    zero = torch.zeros((), dtype=step_tensor.dtype, device=step_tensor.device)
    moved = [torch.where(step_tensor != 0, step, zero) for step in torch._foreach_mul(uphill, step_tensor)]
    torch._foreach_add_(block.weights, moved)


def restore(saved: Saved) -> None:
    """Copy the saved weights back, bit for bit."""
    torch._foreach_copy_([backup.weight for backup in saved.backups], [backup.values for backup in saved.backups])


def _lengths(block: Block) -> list[Tensor]:
    """Return the adaptive metric's ``T = |w| + eta`` in fresh memory."""
    lengths = list(torch._foreach_abs(block.weights))
    torch._foreach_add_(lengths, block.eta)
    return lengths
