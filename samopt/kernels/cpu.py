"""Few passes over memory with stock torch: pieces that fit the cache, and the gradient's memory as the backup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samopt.kernels import reference
from samopt.kernels.block import Backup, Block, NoiseSource, Saved
from samopt.kernels.memory import flat, lie_alike, owns_its_memory

__all__ = ["Exchange", "ascend", "moved", "norm", "pieces", "restore", "save", "scratch", "supports"]

_PIECE = 1 << 18  # elements; 1 MiB in fp32: with its scratch it stays in the cache, and calls cost little beside it
_PIECE_PER_THREAD = 1 << 15  # torch gives no thread less than that
_ROW = 512  # elements summed in one precision; longer sums lose digits when all terms are alike
_METRICS = {"adaptive"}


def supports(block: Block) -> str | None:
    """Return why the CPU path cannot run ``block``, or None where it can."""
    if block.linf:
        return "the l-infinity ball has no CPU form"
    if block.metric is not None and block.metric.name not in _METRICS:
        return f"the {block.metric.name} metric has no CPU form"
    for weight, direction in zip(block.weights, block.directions, strict=True):
        if weight.device.type != "cpu":
            return f"a parameter is on {weight.device}, not on the CPU"
        if weight.dtype not in (torch.float32, torch.float64):
            return f"a parameter has dtype {weight.dtype}, not float32 or float64"
        if direction.layout is not torch.strided or type(direction) is not Tensor:
            return f"a gradient is a {type(direction).__name__} of layout {direction.layout}, not a dense Tensor"
        if direction.dtype is not weight.dtype:
            return f"a gradient has dtype {direction.dtype}, its parameter {weight.dtype}"
        if not lie_alike(weight, direction):
            return f"a parameter has strides {weight.stride()}, its gradient {direction.stride()}, or one has gaps"
    return None


@dataclass
class Exchange(Saved):
    """A way back that fills up piece by piece.

    Attributes:
        pieces: The vectors of weights that are written together, with the memory that takes their old values.
        done: How many pieces have their old values saved; the weights of the others have not been touched.
    """

    pieces: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)
    done: int = 0


@torch.no_grad()
def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor.

    Sums of squares are taken in rows short enough for the block's own precision; where they overflow or vanish there,
    the reference starts again in fp64.
    """
    room = scratch(block)
    rows: list[Tensor] = []
    for weights, directions in pieces(block.weights, block.directions):
        direction = _joined(directions)
        if block.metric is not None:
            direction = _lengths(_joined(weights), block.eta, room[0]).mul_(direction)
        rows.extend(_row_norms(direction))
    if not rows:
        return torch.zeros((), dtype=torch.float64)
    lengths = torch.cat(rows).double()
    length = torch.dot(lengths, lengths).sqrt()
    limits = torch.finfo(block.weights[0].dtype)
    elements = sum(direction.numel() for direction in block.directions)
    # Squares below the smallest normal number lose digits or vanish; here all of them together are below one rounding.
    safe = (elements * limits.tiny / limits.eps) ** 0.5 <= float(length) < float("inf")
    return length if safe else reference.norm(block)


@torch.no_grad()
def save(block: Block, consume: bool = False) -> Exchange:
    """Return room for every weight: its direction's memory where that may be overwritten, fresh memory elsewhere."""
    places = [
        direction if consume and owns_its_memory(direction) else torch.empty_like(weight)
        for weight, direction in zip(block.weights, block.directions, strict=True)
    ]
    backups = [Backup(weight, None, place) for weight, place in zip(block.weights, places, strict=True)]
    return Exchange(backups, list(pieces(block.weights, places)))


@torch.no_grad()
def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Exchange | None = None) -> None:
    """Write ``w + scale T^2 d``, and the old ``w`` into ``saved``, piece by piece."""
    step = float(scale)
    if step == 0:
        return
    room = scratch(block)
    for index, (weights, directions) in enumerate(pieces(block.weights, block.directions)):
        weight = _joined(weights)
        target = moved(weight, _joined(directions), block, step, room, room[0][: weight.numel()])
        if saved is not None:
            torch._foreach_copy_(saved.pieces[index][1], weights)
            saved.done = index + 1  # only now may the weights change, whenever an interrupt comes
        torch._foreach_copy_(weights, torch.split(target, [weight.numel() for weight in weights]))


@torch.no_grad()
def restore(saved: Exchange) -> None:
    """Copy the saved weights back, bit for bit; last first, since weights that share memory were saved in turn."""
    for weights, values in reversed(saved.pieces[: saved.done]):
        torch._foreach_copy_(weights, values)


def moved(
    weight: Tensor, direction: Tensor, block: Block, step: float, room: Sequence[Tensor], target: Tensor
) -> Tensor:
    """Write ``w + step T^2 d`` into ``target``; all are vectors in one order.

    Args:
        weight: Values ``w``.
        direction: Values ``d``.
        block: Says which metric.
        step: The factor.
        room: From ``scratch``.
        target: Takes the result; ``direction``, or the first of ``room``, will do.

    Returns:
        ``target``.
    """
    if block.metric is None:
        return torch.add(weight, direction, alpha=step, out=target)
    length = _lengths(weight, block.eta, room[0])
    uphill = torch.mul(length, direction, out=room[1][: weight.numel()]).mul_(length)  # T^2 alone may underflow
    return torch.add(weight, uphill, alpha=step, out=target)


def scratch(block: Block) -> list[Tensor]:
    """Return room for the intermediate values of one piece.

    Args:
        block: Whose pieces.
    """
    size = min(_piece_size(), sum(weight.numel() for weight in block.weights))
    dtype = block.weights[0].dtype if block.weights else None
    return [torch.empty(size, dtype=dtype) for _ in range(1 if block.metric is None else 2)]


def pieces(left: Sequence[Tensor], right: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield vectors of both lists' memory, the same parts of each: slices of large tensors, several small ones at once.

    Equal arguments give equal pieces, none longer than ``_piece_size()`` and none empty.
    """
    limit = _piece_size()
    gathered: tuple[list[Tensor], list[Tensor]] = ([], [])
    size = 0
    for one, other in zip(left, right, strict=True):
        elements = one.numel()
        if elements > limit:
            for a, b in zip(torch.split(flat(one), limit), torch.split(flat(other), limit), strict=True):
                yield [a], [b]
        elif elements:
            if size + elements > limit:
                yield gathered
                gathered, size = ([], []), 0
            gathered[0].append(flat(one))
            gathered[1].append(flat(other))
            size += elements
    if size:
        yield gathered


def _lengths(weight: Tensor, eta: float, room: Tensor) -> Tensor:
    """Return the adaptive metric's ``T = |w| + eta``, in ``room``."""
    return torch.abs(weight, out=room[: weight.numel()]).add_(eta)


def _row_norms(values: Tensor) -> Iterator[Tensor]:
    whole = values.numel() // _ROW * _ROW
    if whole:
        yield torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)
    if whole < values.numel():
        yield torch.linalg.vector_norm(values[whole:]).view(1)


def _joined(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _piece_size() -> int:
    return max(_PIECE, _PIECE_PER_THREAD * torch.get_num_threads())
