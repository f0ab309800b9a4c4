"""Weights that move to other memory, mostly their gradients', and whose own waits for them with the old values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

from torch import Tensor

from samopt.kernels.block import Block, Saved
from samopt.kernels.memory import Spare, holders, note_writes, room_for

__all__ = ["Move", "arrive", "go_home", "prepare", "split"]


@dataclass
class Move(Saved):
    """A way back: pointers for the weights that leave their memory, values for those that others can see.

    Attributes:
        leaves: For each weight of the block, whether it moves elsewhere; the others are written in place.
        weights: Those that do.
        homes: Their own memory, one for each.
        rooms: Where they move to.
        quiet: Whether autograd is not to notice.
        staying: The way back of the others; None where there are none.
        counts: How many held each room when the weights had just moved there; empty before.
    """

    leaves: list[bool]
    weights: list[Tensor]
    homes: list[Tensor]
    rooms: list[Tensor]
    quiet: bool
    staying: Any
    counts: list[int] = field(default_factory=list)


def prepare(
    block: Block, leaves: list[bool], consume: bool, spare: Spare, save: Callable[[Block, bool, Spare], Saved]
) -> Move:
    """Return where the weights that leave may go, and the way back of all; writes nothing.

    Args:
        block: The block.
        leaves: For each weight, whether it leaves.
        consume: Whether directions that nobody else can reach may be overwritten.
        spare: Where other memory comes from.
        save: Makes the way back of those that stay.
    """
    leaving, staying = split(block, leaves)
    homes = [weight.data for weight in leaving.weights]
    rooms = [
        room_for(weight, direction, consume, spare)
        for weight, direction in zip(leaving.weights, leaving.directions, strict=True)
    ]
    others = save(staying, consume, spare) if staying.weights else None
    return Move([], leaves, leaving.weights, homes, rooms, block.quiet, others)


def arrive(saved: Move) -> None:
    """Point the weights to where their new values have been written.

    Args:
        saved: From ``prepare``.
    """
    _point(saved, saved.rooms)
    saved.counts = [holders(room) for room in saved.rooms]


def go_home(saved: Move, restore: Callable[[Any], None]) -> None:
    """Point the weights back to their own memory, which nothing has written to, and restore the others.

    A weight of whose present memory somebody has taken a name meanwhile stays there, or that name would not follow it.

    Args:
        saved: From ``prepare``.
        restore: Puts back those that stayed.
    """
    places = saved.homes
    if saved.counts:
        moves = zip(saved.homes, saved.rooms, saved.counts, strict=True)
        places = [room.copy_(home) if holders(room) > count else home for home, room, count in moves]
    _point(saved, places)
    if saved.staying is not None:
        restore(saved.staying)


def split(block: Block, leaves: list[bool]) -> tuple[Block, Block]:
    """Return the weights that leave and those that stay.

    Args:
        block: The block.
        leaves: For each weight, whether it leaves.
    """
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
