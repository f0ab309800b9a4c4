"""Few passes over memory with stock torch: pieces that fit the cache, and the gradient's memory as the backup."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from samopt.kernels import reference
from samopt.kernels.block import Block, NoiseSource, Saved, Stride
from samopt.kernels.memory import NEW_MEMORY, WORTHWHILE, Spare, flat, lie_alike, note_writes, room_for

__all__ = [
    "Exchange",
    "Slice",
    "Written",
    "applied",
    "ascend",
    "climb",
    "has_small_only",
    "is_small",
    "move",
    "moved",
    "norm",
    "restore",
    "save",
    "scratch",
    "slices",
    "supports",
]

_PIECE = 1 << 18  # elements; 1 MiB in fp32: with its scratch it stays in the cache, and calls cost little beside it
_SMALL = WORTHWHILE  # elements; up to here a call costs about as much as moving the values
_FEW = 1 << 17  # elements; up to here one sum in fp64 is faster than the calls that it takes to add up rows
_PIECES_TOGETHER = 4  # as large as small weights are joined; splitting them in the cache's size would gain nothing
_PIECE_PER_THREAD = 1 << 15  # torch gives no thread less than that
_ROW = 512  # elements summed in one precision; longer sums lose digits when all terms are alike
_METRICS = {"adaptive"}


def supports(block: Block) -> str | None:
    """Return why the CPU path cannot run ``block``, or None where it can."""
    if block.linf:
        return "the l-infinity ball has no CPU form"
    if block.metric is not None and block.metric.name not in _METRICS:
        return f"the {block.metric.name} metric has no CPU form"
    weight, direction = block.weights[0], block.directions[0]
    if weight.device.type != "cpu":
        return f"a parameter is on {weight.device}, not on the CPU"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"a parameter has dtype {weight.dtype}, not float32 or float64"
    if direction.layout is not torch.strided or type(direction) is not Tensor:
        return f"a gradient is a {type(direction).__name__} of layout {direction.layout}, not a dense Tensor"
    if direction.dtype is not weight.dtype:
        return f"a gradient has dtype {direction.dtype}, its parameter {weight.dtype}"
    if not lie_alike(weight, direction):
        return "the strides of a gradient are not those of its parameter, or one of them has gaps"
    return None


class Written(NamedTuple):
    """What may have been written.

    Attributes:
        weights: Weights or slices of them, as vectors that share their memory.
        values: Their old values, one after the other.
        sizes: Number of elements of each.
    """

    weights: list[Tensor]
    values: Tensor
    sizes: list[int]


@dataclass
class Exchange(Saved):
    """A way back that fills up piece by piece.

    Attributes:
        places: For each weight, memory that will take its old values; None for a small one. Empty where all are small.
        record: What may have been written so far.
    """

    places: list[Tensor | None] = field(default_factory=list)
    record: list[Written] = field(default_factory=list)


class Slice(NamedTuple):
    """A part of a large weight that fits the cache, as vectors that share memory with what they are parts of.

    Attributes:
        weight: Of the weight.
        direction: Of its direction.
        place: Of memory that may take other values of the weight; None where there is none.
    """

    weight: Tensor
    direction: Tensor
    place: Tensor | None


def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor.

    Sums of squares are taken in rows short enough for the block's own precision; where they overflow or vanish there,
    the reference starts again in fp64.
    """
    elements = sum(block.sizes)
    dtype = block.directions[0].dtype
    length: Tensor
    if not elements:
        return torch.zeros((), dtype=torch.float64)
    few = elements <= _FEW and dtype is torch.float32
    if few and block.metric is None:
        # Nothing that fp32 holds has a square that fp64 does not.
        length = torch.linalg.vector_norm(_joined(block.directions, block.are_vectors), dtype=torch.float64)
        return length
    if few and has_small_only(block):
        length = torch.linalg.vector_norm(next(_uphill(block)), dtype=torch.float64)
    else:
        lengths = torch.cat([row for uphill in _uphill(block) for row in _row_norms(uphill)]).double()
        length = torch.dot(lengths, lengths).sqrt()
    limits = torch.finfo(dtype)
    # Squares below the smallest normal number lose digits or vanish; here all of them together are below one rounding.
    safe = (elements * limits.tiny / limits.eps) ** 0.5 <= float(length) < float("inf")
    return length if safe else reference.norm(block)


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Exchange:
    """Return room for every large weight: its direction's memory where that may be overwritten, else other memory."""
    if has_small_only(block):
        return Exchange([])
    places = [
        None if is_small(size) else room_for(weight, direction, consume, spare)
        for size, weight, direction in zip(block.sizes, block.weights, block.directions, strict=True)
    ]
    return Exchange([], places)


def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Exchange | None = None) -> None:
    """Write ``w + scale T^2 d``, and the old ``w`` into ``saved``, piece by piece."""
    move(block, float(scale), saved)


def climb(
    block: Block, length: Tensor, stride: Stride, noise: NoiseSource | None, saved: Exchange
) -> Callable[[], Tensor]:
    """Do ``ascend`` with the step's arithmetic on the host; return what gives how far it went, 0-dim."""
    step = stride.factor()
    move(block, step, saved)
    return applied(step, length)


def restore(saved: Exchange) -> None:
    """Copy the saved weights back, bit for bit; last first, since weights that share memory were saved in turn."""
    for weights, values, sizes in reversed(saved.record):
        torch.split_with_sizes_copy(values, sizes, out=weights)


def is_small(size: int) -> bool:
    """Return whether calls cost more than moving the values, so that tensors had better be joined.

    Args:
        size: Number of elements.
    """
    return size <= _SMALL


def has_small_only(block: Block) -> bool:
    """Return whether no weight of a block is large.

    Args:
        block: The block.
    """
    return is_small(block.largest)


def slices(block: Block, places: Sequence[Tensor | None] | None = None) -> Iterator[Slice]:
    """Yield the parts of a block's large weights.

    Args:
        block: The block.
        places: Memory laid out like each weight, handed out in the same parts; None where there is none.
    """
    if has_small_only(block):
        return
    limit = _piece_size()
    rooms = repeat(None) if places is None else places
    for size, weight, direction, place in zip(block.sizes, block.weights, block.directions, rooms, strict=False):
        if not is_small(size):
            parts = torch.split(flat(weight), limit), torch.split(flat(direction), limit)
            yield from map(Slice, *parts, repeat(None) if place is None else torch.split(flat(place), limit))


def moved(part: Slice, block: Block, step: float, room: Tensor, target: Tensor) -> Tensor:
    """Write ``w + step T^2 d`` for a slice into ``target``.

    Args:
        part: From ``slices``.
        block: Whose.
        step: The factor.
        room: Vector of at least the slice's size that may be overwritten.
        target: Vector for the result; the slice's direction will do.

    Returns:
        ``target``.
    """
    weight, direction, _ = part
    if block.metric is None:
        return torch.add(weight, direction, alpha=step, out=target)
    length = _lengths(weight, block.eta, room[: weight.numel()])
    uphill = torch.mul(direction, length, out=target)
    return torch.addcmul(weight, uphill, length, value=step, out=target)  # T^2 alone may underflow


def scratch(block: Block) -> Tensor:
    """Return room for the intermediate values of one slice.

    Args:
        block: Whose slices; it has some.
    """
    return torch.empty(min(_piece_size(), block.largest), dtype=block.weights[0].dtype)


def applied(step: float, length: Tensor) -> Callable[[], Tensor]:
    """Return what gives the norm of a move, 0-dim.

    Args:
        step: The factor of ``T^2 d``.
        length: ``||T d||_2``, 0-dim; where it is not finite, nothing moved.
    """
    far = float(length)
    return partial(torch.tensor, abs(step) * far if math.isfinite(far) else 0.0, dtype=torch.float64)


def move(block: Block, step: float, saved: Exchange | None) -> None:
    """Do ``ascend`` with a number.

    Args:
        block: Tensors to move.
        step: The factor of ``T^2 d``; 0 does nothing.
        saved: As for ``ascend``.
    """
    if step == 0:
        return
    for some in _small(block):
        weights = _vectors(some, some.weights)
        values = torch.cat(weights)
        if saved is not None:
            saved.record.append(Written(weights, values, some.sizes))  # only now may they change, should one interrupt
        if block.metric is None:
            _add(some.weights, some.directions, step)
        else:
            length = _lengths(values, block.eta, torch.empty_like(values))
            uphill = torch.cat(_vectors(some, some.directions)).mul_(length).mul_(step).mul_(length)
            _add(weights, torch.unsafe_split_with_sizes(uphill, some.sizes), 1.0)
    if has_small_only(block):
        return
    room, target = scratch(block), scratch(block)
    for part in slices(block, None if saved is None else saved.places):
        weight, direction, place = part
        new = None
        if block.metric is not None or (place is not None and place.data_ptr() == direction.data_ptr()):
            new = moved(part, block, step, room, target[: weight.numel()])
        if saved is not None and place is not None:
            saved.record.append(Written([weight], place.copy_(weight), [weight.numel()]))
        if new is None:
            weight.add_(direction, alpha=step)
        else:
            weight.copy_(new)


def _uphill(block: Block) -> Iterator[Tensor]:
    """Yield the values of ``T d`` as vectors; each is overwritten by the next where there is a metric."""
    for some in _small(block):
        vector = _joined(some.directions, some.are_vectors)
        if block.metric is not None:
            weights, room = _joined(some.weights, some.are_vectors), torch.empty_like(vector)
            vector = torch.mul(_lengths(weights, block.eta, room), vector, out=room)
        yield vector
    if has_small_only(block):
        return
    if block.metric is None:
        for size, direction in zip(block.sizes, block.directions, strict=True):
            if not is_small(size):
                yield flat(direction)
        return
    room = scratch(block)
    for part in slices(block):
        place = room[: part.weight.numel()]
        yield torch.mul(_lengths(part.weight, block.eta, place), part.direction, out=place)


def _small(block: Block) -> Iterator[Block]:
    """Yield the small weights with their directions, several pieces' worth at a time."""
    limit = _PIECES_TOGETHER * _piece_size()
    if has_small_only(block) and 0 < sum(block.sizes) <= limit:
        yield block
        return
    weights: list[Tensor] = []
    directions: list[Tensor] = []
    total = 0
    for size, weight, direction in zip(block.sizes, block.weights, block.directions, strict=True):
        if 0 < size <= _SMALL:
            if total + size > limit and weights:
                yield replace(block, weights=weights, directions=directions)
                weights, directions, total = [], [], 0
            weights.append(weight)
            directions.append(direction)
            total += size
    if weights:
        yield replace(block, weights=weights, directions=directions)


def _piece_size() -> int:
    return max(_PIECE, _PIECE_PER_THREAD * torch.get_num_threads())


def _joined(tensors: list[Tensor], are_vectors: bool) -> Tensor:
    """Return the values as one vector; that of one tensor may share its memory."""
    if are_vectors:
        return torch.cat(tensors)
    vector: Tensor = torch._C._nn.flatten_dense_tensors(tensors)
    return vector


def _vectors(block: Block, tensors: list[Tensor]) -> list[Tensor]:
    """Return the weights or the directions of a block as vectors that share their memory."""
    return tensors if block.are_vectors else list(map(flat, tensors))


def _add(weights: list[Tensor], uphill: list[Tensor] | tuple[Tensor, ...], step: float) -> None:
    """Add ``step * uphill`` to weights laid out like it, with the bits of ``add_`` at a third of its time a call."""
    torch._fused_sgd_(
        weights,
        uphill,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=-step,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    note_writes(weights)


def _lengths(weight: Tensor, eta: float, room: Tensor) -> Tensor:
    """Return the adaptive metric's ``T = |w| + eta`` in ``room``; without ``eta`` the weight: only ``T^2`` counts."""
    return torch.abs(weight, out=room).add_(eta) if eta else weight


def _row_norms(values: Tensor) -> Iterator[Tensor]:
    whole = values.numel() // _ROW * _ROW
    if whole:
        yield torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)
    if whole < values.numel():
        yield torch.linalg.vector_norm(values[whole:]).view(1)
