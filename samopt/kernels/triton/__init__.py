"""The Triton row of the dispatch table; Triton itself is imported when a kernel first runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from samopt.kernels.block import Block, NoiseSource, Norms, StepSize
from samopt.kernels.memory import same_memory_layout
from samopt.kernels.triton.availability import missing, unavailable
from samopt.kernels.triton.backup import TritonBackup

__all__ = ["TritonBackup", "ascend", "backup", "measure", "missing", "norm", "restore", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GEOMETRIES = {"adaptive", "fisher"}


def supports(block: Block) -> str | None:
    """Return why Triton cannot run ``block``, or None where it can."""
    weight, direction = block.weights[0], block.directions[0]
    if (reason := unavailable(weight.device)) is not None:
        return reason
    if block.geometry is not None and block.geometry.name not in _GEOMETRIES:
        return f"the {block.geometry.name} geometry has no Triton form"
    if weight.dtype not in _DTYPES:
        return f"a parameter has dtype {weight.dtype}, not float32, bfloat16 or float16"
    if direction.layout is not torch.strided or type(direction) is not Tensor:
        return f"a gradient is a {type(direction).__name__} of layout {direction.layout}, not a dense Tensor"
    if direction.dtype is not weight.dtype:
        return f"a gradient has dtype {direction.dtype}, its parameter {weight.dtype}"
    if any(direction.device != weight.device for direction in block.directions):
        return f"a gradient is on another device than its parameter, on {weight.device}"
    if not all(map(same_memory_layout, block.weights, block.directions)):
        return "the strides of a gradient are not those of its parameter, or one of them has gaps"
    width = weight.element_size()
    if _overlap(tuple((w.data_ptr(), w.data_ptr() + w.numel() * width) for w in block.weights)):
        return "two parameters share memory, which one launch would move in no certain order"
    return None


@functools.lru_cache(maxsize=16)
def _overlap(ranges: tuple[tuple[int, int], ...]) -> bool:
    """Return whether two ranges of addresses have one in common."""
    filled = sorted((begin, end) for begin, end in ranges if begin < end)
    return any(begin < end for (_, end), (begin, _) in itertools.pairwise(filled))


def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor."""
    return measure([block]).norm


def measure(blocks: Sequence[Block]) -> Norms:
    """Return the norms of blocks of one device: a launch for each block, and one that joins them."""
    from samopt.kernels.triton import launch

    return launch.measure(blocks)


def backup(block: Block, values: list[Tensor]) -> TritonBackup:
    """Return a backup that the next ascent of ``block`` fills in its own launch."""
    from samopt.kernels.triton import launch

    return launch.backup(block, values)


def ascend(
    block: Block,
    step: StepSize,
    length: Tensor,
    noise: NoiseSource | None,
    *,
    into: list[Tensor] | None = None,
    backup: TritonBackup | None = None,
) -> Tensor:
    """Write ``w + scale T^2 d`` (l2) or ``w + scale T sign(d)`` (l-infinity), and the old ``w`` into ``backup``."""
    from samopt.kernels.triton import launch

    return launch.ascend(block, step, length, noise, into=into, backup=backup)


def restore(saved: TritonBackup) -> None:
    """Copy the old weights back, bit for bit, where the device has saved them; may run again."""
    from samopt.kernels.triton import launch

    launch.restore(saved)
