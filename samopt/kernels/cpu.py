"""Few passes over memory with stock torch: small tensors joined, large ones in pieces that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from samopt.kernels import reference
from samopt.kernels.block import Block, NoiseSource, StepSize
from samopt.kernels.memory import flat, same_memory_layout

__all__ = ["ascend", "linked", "norm", "supports"]

_PIECE = 1 << 18  # elements; 1 MiB in fp32: with its scratch it stays in the cache, and calls cost little beside it
_PIECE_PER_THREAD = 1 << 15  # torch gives no thread less than that
_SMALL = 1 << 15  # elements; up to here calls cost more than joining the values, so small tensors are joined
_FEW = 1 << 17  # elements; up to here one sum in fp64 is faster than the calls that it takes to add up rows
_ROW = 512  # elements summed in fp32; longer sums lose digits when all terms are equal
_GEOMETRIES = {"adaptive"}
# The values of several tensors as one vector, to be read only: that of one tensor shares its memory.
_join: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors


def supports(block: Block) -> str | None:
    """Return why the CPU path cannot run ``block``, or None where it can."""
    if block.linf:
        return "the l-infinity ball has no CPU form"
    if block.geometry is not None and block.geometry.name not in _GEOMETRIES:
        return f"the {block.geometry.name} geometry has no CPU form"
    weight, direction = block.weights[0], block.directions[0]
    if weight.device.type != "cpu":
        return f"a parameter is on {weight.device}, not on the CPU"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"a parameter has dtype {weight.dtype}, not float32 or float64"
    if direction.layout is not torch.strided or type(direction) is not Tensor:
        return f"a gradient is a {type(direction).__name__} of layout {direction.layout}, not a dense Tensor"
    if direction.dtype is not weight.dtype:
        return f"a gradient has dtype {direction.dtype}, its parameter {weight.dtype}"
    if not same_memory_layout(weight, direction):
        return "the strides of a gradient are not those of its parameter, or one of them has gaps"
    return None


def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor.

    Sums of squares are taken in rows short enough for the precision of the block; where they overflow or vanish there,
    the reference starts again in fp64.
    """
    elements = sum(block.sizes)
    dtype = block.directions[0].dtype
    if not elements:
        return torch.zeros((), dtype=torch.float64)
    length: Tensor
    is_joined = block.geometry is None or max(block.sizes) <= _SMALL
    if is_joined and elements <= _FEW and dtype is torch.float32:
        # The square of every finite fp32 number is a normal fp64 number or 0, so this needs no second try.
        length = torch.linalg.vector_norm(_join_scaled(block, block.weights, block.directions), dtype=torch.float64)
        return length
    rows: list[Tensor] = []
    for uphill in _scaled_directions(block):
        rows += _row_norms(uphill)
    lengths = torch.cat(rows).double()
    length = torch.dot(lengths, lengths).sqrt()
    limits = torch.finfo(dtype)
    # Squares below the smallest normal number lose digits or vanish; here all of them together are below one rounding.
    safe = (elements * limits.tiny / limits.eps) ** 0.5 <= float(length) < math.inf
    return length if safe else reference.norm(block)


def ascend(
    block: Block, step: StepSize, length: Tensor, noise: NoiseSource | None, *, into: list[Tensor] | None = None
) -> Tensor:
    """Write ``w + scale T^2 d`` as ``reference.ascend`` does; return the norm of the move."""
    factor, number = step.factor(), float(length)
    targets = block.weights if into is None else into
    is_small = max(block.sizes, default=0) <= _SMALL
    if into is not None and (factor == 0 or (block.geometry is None and is_small)):
        torch._foreach_copy_(into, block.weights)
    if factor == 0:  # the directions may hold infinities, and 0 times infinity is nan
        return torch.zeros((), dtype=torch.float64)
    if block.geometry is not None:
        _ascend_adaptive(block, factor, targets)
    elif into is None or is_small:
        torch._foreach_add_(targets, block.directions, alpha=factor)
    else:  # one pass over memory instead of two; for small tensors, a call per tensor would cost more than the pass
        for weight, direction, target in zip(block.weights, block.directions, targets, strict=True):
            torch.add(weight, direction, alpha=factor, out=target)
    return torch.tensor(abs(factor) * number, dtype=torch.float64)


def linked(block: Block, step: StepSize, length: Tensor) -> tuple[list[Tensor], Tensor] | None:
    """Return ``w + scale T^2 d`` as new tensors that autograd links to the weights, as sums, and the norm of the move.

    For small tensors this takes half the time of writing the values first and linking them by a function of our own.
    The memory of large tensors is better kept from step to step: None there.
    """
    if max(block.sizes, default=0) > _SMALL or (block.geometry is not None and sum(block.sizes) > _PIECE):
        return None
    factor = step.factor()
    if factor == 0:  # the directions may hold infinities, and 0 times infinity is nan
        return None
    moves = block.directions
    if block.geometry is not None:
        move = _adaptive_move(block.weights, moves, block.eta, factor)
        moves, factor = torch._C._nn.unflatten_dense_tensors(move, moves), 1.0
    with torch.enable_grad():  # not by a foreach function: only one backward may go through that
        sums = [torch.add(weight, move, alpha=factor) for weight, move in zip(block.weights, moves, strict=True)]
    return sums, torch.tensor(abs(step.factor()) * float(length), dtype=torch.float64)


def _adaptive_move(weights: list[Tensor], directions: list[Tensor], eta: float, factor: float) -> Tensor:
    """Return ``factor T^2 d`` with ``T = |w| + eta`` as one vector."""
    with torch.no_grad():
        t = _join(weights).abs().add_(eta)
        return _join(directions).mul(t).mul_(t).mul_(factor)  # T^2 alone may underflow


def _ascend_adaptive(block: Block, factor: float, targets: list[Tensor]) -> None:
    """Write ``w + factor T^2 d`` with ``T = |w| + eta``."""
    for weights, directions, places in _small_groups(block, targets):
        move = _adaptive_move(weights, directions, block.eta, factor)
        if targets is not block.weights:
            torch._foreach_copy_(places, weights)
        # Added and not assigned: weights that share memory move by the sum of their moves.
        torch._foreach_add_(places, torch._C._nn.unflatten_dense_tensors(move, places))
    room = _scratch(block, 2)
    for weight, direction, target in _pieces(block, targets):
        t = torch.abs(weight, out=room[0, : len(weight)]).add_(block.eta)
        uphill = torch.mul(direction, t, out=room[1, : len(weight)])
        torch.addcmul(weight, uphill, t, value=factor, out=target)


def _scaled_directions(block: Block) -> Iterator[Tensor]:
    """Yield the values of ``T d`` as vectors; the next one overwrites the last."""
    for weights, directions, _ in _small_groups(block, block.weights):
        yield _join_scaled(block, weights, directions)
    if block.geometry is None:
        for size, direction in zip(block.sizes, block.directions, strict=True):
            if size > _SMALL:
                yield flat(direction)
        return
    room = _scratch(block, 1)
    for weight, direction, _ in _pieces(block, block.weights):
        yield torch.abs(weight, out=room[0, : len(weight)]).add_(block.eta).mul_(direction)


def _join_scaled(block: Block, weights: list[Tensor], directions: list[Tensor]) -> Tensor:
    """Return ``T d`` of several tensors as one vector, to be read only."""
    joined = _join(directions)
    return joined if block.geometry is None else _join(weights).abs().add_(block.eta).mul_(joined)


def _small_groups(block: Block, targets: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Yield the small weights, their directions and targets, in groups whose values fit the cache."""
    group: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    total, limit = 0, _piece_size()
    for size, *tensors in zip(block.sizes, block.weights, block.directions, targets, strict=True):
        if not 0 < size <= _SMALL:
            continue
        if total and total + size > limit:
            yield group
            group, total = ([], [], []), 0
        for members, tensor in zip(group, tensors, strict=True):
            members.append(tensor)
        total += size
    if total:
        yield group


def _pieces(block: Block, targets: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield pieces of the large weights, of their directions and of the targets, as vectors that share their memory."""
    limit = _piece_size()
    for size, weight, direction, target in zip(block.sizes, block.weights, block.directions, targets, strict=True):
        if size > _SMALL:
            vectors = flat(weight), flat(direction), flat(target)
            yield from zip(*[torch.split(vector, limit) for vector in vectors], strict=True)


def _scratch(block: Block, rows: int) -> Tensor:
    """Return memory for the intermediate values of one piece."""
    size = min(_piece_size(), max(block.sizes)) if max(block.sizes) > _SMALL else 0
    return torch.empty(rows, size, dtype=block.weights[0].dtype)


def _piece_size() -> int:
    """Return how many elements a piece has: what fits the cache, but enough for every thread."""
    return max(_PIECE, _PIECE_PER_THREAD * torch.get_num_threads())


def _row_norms(values: Tensor) -> list[Tensor]:
    """Return the norms of the rows of a vector, and that of the rest."""
    whole = values.numel() // _ROW * _ROW
    norms = [torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)] if whole else []
    if whole < values.numel():
        norms.append(torch.linalg.vector_norm(values[whole:]).view(1))
    return norms
