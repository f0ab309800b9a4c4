"""The fewest bytes: weights move into the gradients' memory, and their own waits untouched until they move back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from samopt.kernels import cpu
from samopt.kernels.block import Block, NoiseSource, Saved
from samopt.kernels.memory import NEW_MEMORY, Spare, owns_its_memory, room_for

__all__ = ["Move", "ascend", "restore", "save"]


@dataclass
class Move(Saved):
    """A way back: pointers for the weights that leave their memory, values for those that others can see.

    Attributes:
        leaving: The weights that move elsewhere.
        homes: Their own memory, one for each.
        rooms: Where they move to.
        staying: The weights that are written in place.
        exchange: Their way back.
    """

    leaving: Block
    homes: list[Tensor]
    rooms: list[Tensor]
    staying: Block
    exchange: cpu.Exchange


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Move:
    """Return where every weight may go, and its way back.

    A view, an alias, NumPy or another process would not see a weight move, so what they share stays where it is; small
    weights do, too, since they are faster together.
    """
    if cpu.has_small_only(block):
        leaving, staying = replace(block, weights=[], directions=[]), block
    else:
        leaves = [
            not cpu.is_small(size) and owns_its_memory(weight)
            for size, weight in zip(block.sizes, block.weights, strict=True)
        ]
        leaving, staying = _part(block, leaves), _part(block, [not leave for leave in leaves])
    if block.quiet:
        staying = staying.behind_autograd()
    exchange = cpu.save(staying, consume, spare)
    homes = [weight.data for weight in leaving.weights]
    rooms = [
        room_for(weight, direction, consume, spare)
        for weight, direction in zip(leaving.weights, leaving.directions, strict=True)
    ]
    return Move([], leaving, homes, rooms, staying, exchange)


def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Move | None = None) -> None:
    """Write ``w + scale T^2 d`` elsewhere and point each weight there; without ``saved``, in place."""
    if saved is None:
        cpu.ascend(block, scale, noise)
        return
    cpu.ascend(saved.staying, scale, noise, saved.exchange)
    step, leaving = float(scale), saved.leaving
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
    _point(leaving, saved.rooms)


def restore(saved: Move) -> None:
    """Point the weights back to their own memory, which nothing has written to, and copy the others back."""
    _point(saved.leaving, saved.homes)
    cpu.restore(saved.exchange)


def _part(block: Block, chosen: list[bool]) -> Block:
    weights, directions = list(compress(block.weights, chosen)), list(compress(block.directions, chosen))
    return replace(block, weights=weights, directions=directions)


def _point(block: Block, places: list[Tensor]) -> None:
    for weight, place in zip(block.weights, places, strict=True):
        weight.data = place
        if not block.quiet:
            torch.autograd.graph.increment_version(weight)  # a graph that saved it must notice, as after any write
