"""The fewest bytes on a GPU: weights move into the gradients' memory, and their own waits until they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samopt._numerics.low_precision import is_low_precision
from samopt.kernels.block import Block, NoiseSource, Stride
from samopt.kernels.memory import NEW_MEMORY, Spare, owns_its_memory
from samopt.kernels.relocation import Move, arrive, go_home, prepare, split
from samopt.kernels.triton import launch
from samopt.kernels.triton.launch import Way

__all__ = ["ascend", "climb", "restore", "save"]


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Move:
    """Return where every weight may go, and its way back; one that others can see stays where it is."""
    return prepare(block, [owns_its_memory(weight) for weight in block.weights], consume, spare, _save_staying)


def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Move | None = None) -> None:
    """Write ``w + scale T^2 d`` or ``w + scale T sign(d)`` elsewhere and point each weight there; else in place."""
    if saved is None:
        launch.ascend(block, scale, noise)
        return
    leaving, staying = _split(block, saved)
    if staying.weights:
        launch.ascend(staying, scale, noise, saved.staying)
    if leaving.weights:
        launch.ascend(leaving, scale, noise, rooms=saved.rooms)
        arrive(saved)


def climb(block: Block, length: Tensor, stride: Stride, noise: NoiseSource | None, saved: Move) -> Callable[[], Tensor]:
    """Do ``ascend`` as far as ``stride`` says; return what gives the norm of the move.

    Args:
        block: Tensors to move.
        length: ``||T d||_2`` over the block, 0-dim fp64 on its device.
        stride: How far.
        noise: Uniform numbers for stochastic rounding, or None.
        saved: From ``save``.

    Returns:
        As for ``launch.climb``.
    """
    leaving, staying = _split(block, saved)
    lengths: list[Callable[[], Tensor]] = []
    if staying.weights:
        lengths.append(launch.climb(staying, length, stride, noise, saved.staying))
    if leaving.weights:
        lengths.append(launch.climb(leaving, length, stride, noise, rooms=saved.rooms))
        arrive(saved)
    return lengths[0] if len(lengths) == 1 else _together(lengths, block)


def restore(saved: Move) -> None:
    """Point the weights back to their own memory, and copy those back that stayed."""
    go_home(saved, launch.restore)


def _save_staying(staying: Block, consume: bool, spare: Spare) -> Way:
    return launch.save(staying.behind_autograd() if staying.quiet else staying, consume, spare)


def _split(block: Block, saved: Move) -> tuple[Block, Block]:
    leaving, staying = split(block, saved.leaves)
    return leaving, staying.behind_autograd() if block.quiet else staying


def _together(lengths: Sequence[Callable[[], Tensor]], block: Block) -> Callable[[], Tensor]:
    """Return what gives the norm of a move in two parts, each of which knows the whole's unless it is measured."""

    def joined() -> Tensor:
        each = torch.stack([length() for length in lengths])
        measured = is_low_precision(block.weights[0])
        return torch.linalg.vector_norm(each) if measured and not block.linf else each.amax()

    return joined
