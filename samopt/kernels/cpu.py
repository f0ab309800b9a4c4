"""Few passes over memory with stock torch: pieces that fit the cache, and the gradient's memory as the backup."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor

from samopt.kernels import reference
from samopt.kernels.block import Block, NoiseSource, Saved, Stride
from samopt.kernels.memory import flat, lie_alike, owns_its_memory

__all__ = [
    "Exchange",
    "Piece",
    "ascend",
    "climb",
    "is_small",
    "moved",
    "norm",
    "pieces",
    "restore",
    "save",
    "scratch",
    "supports",
]

_PIECE = 1 << 18  # elements; 1 MiB in fp32: with its scratch it stays in the cache, and calls cost little beside it
_SMALL = 1 << 14  # elements; up to here a call costs about as much as moving the values
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
    if not all(map(lie_alike, block.weights, block.directions)):
        return "the strides of a gradient are not those of its parameter, or one of them has gaps"
    return None


@dataclass
class Exchange(Saved):
    """A way back that fills up piece by piece.

    Attributes:
        places: For each weight, memory that will take its old values; None for a small one.
        record: The weights that may have been written so far, with their old values as a vector.
    """

    places: list[Tensor | None] = field(default_factory=list)
    record: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)

    def keep(self, piece: Piece) -> None:
        """Save a piece that is about to be written.

        Args:
            piece: From ``pieces``.
        """
        place = torch.empty_like(piece.weight) if piece.place is None and len(piece.weights) == 1 else piece.place
        values = piece.weight if place is None else place.copy_(piece.weight)
        self.record.append((piece.weights, values))


@dataclass(frozen=True)
class Piece:
    """A part of a block that fits the cache: several small weights, or a slice of a large one.

    Attributes:
        weights: The weights, or one vector of a weight's memory.
        directions: The directions, or one vector of a direction's memory.
        place: A vector that may take the old values of a slice.
    """

    weights: list[Tensor]
    directions: list[Tensor]
    place: Tensor | None = None

    @cached_property
    def weight(self) -> Tensor:
        """Values of the weights as one vector: a copy if there are several."""
        return _joined(self.weights)

    @cached_property
    def direction(self) -> Tensor:
        """Values of the directions, in the same order."""
        return _joined(self.directions)


@torch.no_grad()
def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor.

    Sums of squares are taken in rows short enough for the block's own precision; where they overflow or vanish there,
    the reference starts again in fp64.
    """
    sizes = [direction.numel() for direction in block.directions]
    if block.metric is None and sum(sizes) <= _SMALL and block.weights[0].dtype is torch.float32:
        # Nothing that fp32 holds has a square that fp64 does not.
        whole: Tensor = torch.linalg.vector_norm(_joined(block.directions), dtype=torch.float64)
        return whole
    room = scratch(block) if block.metric is not None else []
    rows: list[Tensor] = []
    for piece in pieces(block):
        uphill = piece.direction
        if block.metric is not None:
            uphill = _lengths(piece.weight, block.eta, room[0]).mul_(uphill)
        rows.extend(_row_norms(uphill))
    if not rows:
        return torch.zeros((), dtype=torch.float64)
    lengths = torch.cat(rows).double()
    length = torch.dot(lengths, lengths).sqrt()
    limits = torch.finfo(block.weights[0].dtype)
    elements = sum(sizes)
    # Squares below the smallest normal number lose digits or vanish; here all of them together are below one rounding.
    safe = (elements * limits.tiny / limits.eps) ** 0.5 <= float(length) < float("inf")
    return length if safe else reference.norm(block)


@torch.no_grad()
def save(block: Block, consume: bool = False) -> Exchange:
    """Return room for every large weight: its direction's memory where that may be overwritten, else fresh memory."""
    places = [
        None if is_small(weight) else direction if consume and owns_its_memory(direction) else torch.empty_like(weight)
        for weight, direction in zip(block.weights, block.directions, strict=True)
    ]
    return Exchange([], places)


@torch.no_grad()
def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Exchange | None = None) -> None:
    """Write ``w + scale T^2 d``, and the old ``w`` into ``saved``, piece by piece."""
    _move(block, float(scale), saved)


@torch.no_grad()
def climb(block: Block, length: Tensor, stride: Stride, noise: NoiseSource | None, saved: Exchange) -> Tensor:
    """Do ``ascend`` with the step's arithmetic on the host; return how far it went, 0-dim."""
    step, far = stride.factor(), float(length)
    _move(block, step, saved)
    return torch.tensor(abs(step) * far if math.isfinite(far) else 0.0, dtype=torch.float64)


def _move(block: Block, step: float, saved: Exchange | None) -> None:
    if step == 0:
        return
    room: list[Tensor] = []
    for piece in pieces(block, None if saved is None else saved.places):
        target = None
        if block.metric is not None or len(piece.weights) == 1:
            room = room or scratch(block)
            target = moved(piece, block, step, room, room[0][: piece.weight.numel()])
        if saved is not None:
            saved.keep(piece)  # only now may the weights change, whenever an interrupt comes
        if target is None:
            torch._foreach_add_(piece.weights, piece.directions, alpha=step)
        else:
            _write(piece.weights, target)


@torch.no_grad()
def restore(saved: Exchange) -> None:
    """Copy the saved weights back, bit for bit; last first, since weights that share memory were saved in turn."""
    for weights, values in reversed(saved.record):
        _write(weights, values)


def is_small(weight: Tensor) -> bool:
    """Return whether calls cost more than moving the values, so that tensors had better be joined.

    Args:
        weight: A weight.
    """
    return weight.numel() <= _SMALL


def pieces(block: Block, places: Sequence[Tensor | None] | None = None) -> Iterator[Piece]:
    """Yield the parts of a block, none empty: slices of large weights' memory, several small weights at once.

    Args:
        block: The block.
        places: Memory laid out like each weight, handed out in the same parts; None where there is none.
    """
    limit = _piece_size()
    weights: list[Tensor] = []
    directions: list[Tensor] = []
    size = 0
    for index, (weight, direction) in enumerate(zip(block.weights, block.directions, strict=True)):
        elements = weight.numel()
        if elements > _SMALL:
            yield from _slices(weight, direction, None if places is None else places[index], limit)
        elif elements:
            if size + elements > limit:
                yield Piece(weights, directions)
                weights, directions, size = [], [], 0
            weights.append(weight)
            directions.append(direction)
            size += elements
    if size:
        yield Piece(weights, directions)


def moved(piece: Piece, block: Block, step: float, room: Sequence[Tensor], target: Tensor) -> Tensor:
    """Write ``w + step T^2 d`` for a piece into ``target``.

    Args:
        piece: From ``pieces``.
        block: Whose piece it is.
        step: The factor.
        room: From ``scratch``.
        target: A vector for the result; the piece's direction, or the first of ``room``, will do.

    Returns:
        ``target``.
    """
    if block.metric is None:
        return torch.add(piece.weight, piece.direction, alpha=step, out=target)
    length = _lengths(piece.weight, block.eta, room[0])
    uphill = torch.mul(length, piece.direction, out=room[1][: length.numel()]).mul_(length)  # T^2 alone may underflow
    return torch.add(piece.weight, uphill, alpha=step, out=target)


def scratch(block: Block) -> list[Tensor]:
    """Return room for the intermediate values of one piece.

    Args:
        block: Whose pieces.
    """
    size = min(_piece_size(), sum(weight.numel() for weight in block.weights))
    dtype = block.weights[0].dtype if block.weights else None
    return [torch.empty(size, dtype=dtype) for _ in range(1 if block.metric is None else 2)]


def _piece_size() -> int:
    return max(_PIECE, _PIECE_PER_THREAD * torch.get_num_threads())


def _slices(weight: Tensor, direction: Tensor, place: Tensor | None, limit: int) -> Iterator[Piece]:
    weights, directions = torch.split(flat(weight), limit), torch.split(flat(direction), limit)
    places = repeat(None, len(weights)) if place is None else torch.split(flat(place), limit)
    for w, d, p in zip(weights, directions, places, strict=True):
        yield Piece([w], [d], p)


def _joined(tensors: list[Tensor]) -> Tensor:
    vector: Tensor = torch._C._nn.flatten_dense_tensors(tensors)  # unlike torch.cat, it takes any shapes
    return vector


def _write(weights: list[Tensor], values: Tensor) -> None:
    torch._foreach_copy_(weights, torch._C._nn.unflatten_dense_tensors(values, weights))


def _lengths(weight: Tensor, eta: float, room: Tensor) -> Tensor:
    """Return the adaptive metric's ``T = |w| + eta``, in ``room``."""
    return torch.abs(weight, out=room[: weight.numel()]).add_(eta)


def _row_norms(values: Tensor) -> Iterator[Tensor]:
    whole = values.numel() // _ROW * _ROW
    if whole:
        yield torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)
    if whole < values.numel():
        yield torch.linalg.vector_norm(values[whole:]).view(1)
