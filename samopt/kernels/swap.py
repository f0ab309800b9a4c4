"""The fewest bytes: large weights move into the gradients' memory, and their own waits until they move back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import compress

import torch
from torch import Tensor

from samopt.kernels import cpu
from samopt.kernels.block import Block, NoiseSource, Saved, Stride
from samopt.kernels.memory import NEW_MEMORY, Spare, holders, note_writes, owns_its_memory, room_for

__all__ = ["Move", "ascend", "climb", "restore", "save"]


@dataclass
class Move(Saved):
    """A way back: pointers for the weights that leave their memory, values for those that others can see.

    Attributes:
        leaves: For each weight of the block, whether it moves elsewhere; the others are written in place.
        weights: Those that do.
        homes: Their own memory, one for each.
        rooms: Where they move to.
        quiet: Whether autograd is not to notice.
        exchange: The way back of the others.
        counts: How many held each room when the weights had just moved there; empty before.
    """

    leaves: list[bool]
    weights: list[Tensor]
    homes: list[Tensor]
    rooms: list[Tensor]
    quiet: bool
    exchange: cpu.Exchange
    counts: list[int] = field(default_factory=list)


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
    leaving, staying = _split(block, leaves)
    homes = [weight.data for weight in leaving.weights]
    rooms = [
        room_for(weight, direction, consume, spare)
        for weight, direction in zip(leaving.weights, leaving.directions, strict=True)
    ]
    return Move([], leaves, leaving.weights, homes, rooms, block.quiet, cpu.save(staying, consume, spare))


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
    """Point the weights back to their own memory, which nothing has written to, and copy the others back.

    A weight of whose present memory somebody has taken a name meanwhile stays there, or that name would not follow it.
    """
    places = saved.homes
    if saved.counts:
        moves = zip(saved.homes, saved.rooms, saved.counts, strict=True)
        places = [room.copy_(home) if holders(room) > count else home for home, room, count in moves]
    _point(saved, places)
    cpu.restore(saved.exchange)


def _move(block: Block, step: float, saved: Move) -> None:
    leaving, staying = _split(block, saved.leaves)
    cpu.move(staying.behind_autograd() if block.quiet else staying, step, saved.exchange)
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
    _point(saved, saved.rooms)
    saved.counts = [holders(room) for room in saved.rooms]


def _split(block: Block, leaves: list[bool]) -> tuple[Block, Block]:
    """Return the weights that leave and those that stay."""
    if not any(leaves):
        return replace(block, weights=[], directions=[]), block
    return _part(block, leaves), _part(block, [not leave for leave in leaves])


def _part(block: Block, chosen: list[bool]) -> Block:
    weights, directions = list(compress(block.weights, chosen)), list(compress(block.directions, chosen))
    return replace(block, weights=weights, directions=directions)


def _point(saved: Move, places: list[Tensor]) -> None:
    for weight, place in zip(saved.weights, places, strict=True):
        weight.data = place
    if not saved.quiet:
        note_writes(saved.weights)  # a graph that saved one must notice
