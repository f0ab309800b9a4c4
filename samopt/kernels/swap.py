"""The fewest bytes on the CPU: large weights move into the gradients' memory, and their own waits until they return."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samopt.kernels import cpu
from samopt.kernels.block import Block, NoiseSource, Stride
from samopt.kernels.memory import NEW_MEMORY, Spare, owns_its_memory
from samopt.kernels.relocation import Move, arrive, go_home, prepare, split

__all__ = ["ascend", "climb", "restore", "save"]


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Move:
    """Return where every weight may go, and its way back.

    A view, an alias, NumPy or another process would not see a weight move, so what they share stays where it is; small
    weights do, too, since they are faster together.
    """
    leaves = [False] * len(block.weights)
    if not cpu.has_small_only(block):
        leaves = [
            not cpu.is_small(size) and owns_its_memory(weight)
            for size, weight in zip(block.sizes, block.weights, strict=True)
        ]
    return prepare(block, leaves, consume, spare, cpu.save)


def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Move | None = None) -> None:
    """Write ``w + scale T^2 d`` elsewhere and point each weight there; without ``saved``, in place."""
    if saved is None:
        cpu.ascend(block, scale, noise)
    else:
        _move(block, float(scale), saved)


def climb(block: Block, length: Tensor, stride: Stride, noise: NoiseSource | None, saved: Move) -> Callable[[], Tensor]:
    """Do ``ascend`` with the step's arithmetic on the host; return what gives how far it went, 0-dim."""
    step = stride.factor()
    _move(block, step, saved)
    return cpu.applied(step, length)


def restore(saved: Move) -> None:
    """Point the weights back to their own memory, and copy those back that stayed."""
    go_home(saved, cpu.restore)


def _move(block: Block, step: float, saved: Move) -> None:
    leaving, staying = split(block, saved.leaves)
    if staying.weights:
        cpu.move(staying.behind_autograd() if block.quiet else staying, step, saved.staying)
    if step == 0 or not leaving.weights:
        return
    if block.metric is None:
        for weight, direction, room in zip(leaving.weights, leaving.directions, saved.rooms, strict=True):
            torch.add(weight, direction, alpha=step, out=room)
    else:
        scratch = cpu.scratch(leaving)
        for part in cpu.slices(leaving, saved.rooms):
            if part.place is not None:
                cpu.moved(part, block, step, scratch, part.place)
    arrive(saved)
