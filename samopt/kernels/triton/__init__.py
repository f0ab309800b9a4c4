"""The Triton rows of the dispatch table, which import Triton when a kernel first runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from samopt.kernels.block import Block, Lengths, NoiseSource, Stride
from samopt.kernels.memory import NEW_MEMORY, Spare, lie_alike
from samopt.kernels.relocation import Move
from samopt.kernels.triton.availability import missing, unavailable

if TYPE_CHECKING:
    from samopt.kernels.triton.launch import Way

__all__ = [
    "ascend",
    "climb",
    "measure",
    "missing",
    "norm",
    "refuses",
    "restore",
    "restore_and_step",
    "save",
    "supports",
    "swap_ascend",
    "swap_climb",
    "swap_restore",
    "swap_save",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_METRICS = {"adaptive", "fisher"}
_BASES = (SGD, Adam, AdamW)


def supports(block: Block) -> str | None:
    """Return why Triton cannot run ``block``, or None where it can."""
    weight, direction = block.weights[0], block.directions[0]
    if (reason := unavailable(weight.device)) is not None:
        return reason
    if block.metric is not None and block.metric.name not in _METRICS:
        return f"the {block.metric.name} metric has no Triton form"
    if weight.dtype not in _DTYPES:
        return f"a parameter has dtype {weight.dtype}, not float32, bfloat16 or float16"
    if direction.layout is not torch.strided or type(direction) is not Tensor:
        return f"a gradient is a {type(direction).__name__} of layout {direction.layout}, not a dense Tensor"
    if direction.dtype is not weight.dtype:
        return f"a gradient has dtype {direction.dtype}, its parameter {weight.dtype}"
    if any(direction.device != weight.device for direction in block.directions):
        return f"a gradient is on another device than its parameter, on {weight.device}"
    if not all(map(lie_alike, block.weights, block.directions)):
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
    from samopt.kernels.triton import launch

    return launch.norm(block)


def measure(blocks: Sequence[Block]) -> Lengths:
    """Return the norms of blocks of one device: a launch for each block, and one that joins them."""
    from samopt.kernels.triton import launch

    return launch.measure(blocks)


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Way:
    """Return room for every weight: its direction's memory where that may be overwritten, else other memory."""
    from samopt.kernels.triton import launch

    return launch.save(block, consume, spare)


def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Way | None = None) -> None:
    """Write ``w + scale T^2 d`` (l2) or ``w + scale T sign(d)`` (l-infinity), and the old ``w`` into ``saved``."""
    from samopt.kernels.triton import launch

    launch.ascend(block, scale, noise, saved)


def climb(block: Block, length: Tensor, stride: Stride, noise: NoiseSource | None, saved: Way) -> Callable[[], Tensor]:
    """Ascend as far as ``stride`` says, with its arithmetic on the device; return what gives its norm."""
    from samopt.kernels.triton import launch

    return launch.climb(block, length, stride, noise, saved)


def restore(saved: Way) -> None:
    """Copy the saved weights back, bit for bit, if the device has saved them; may run again."""
    from samopt.kernels.triton import launch

    launch.restore(saved)


def swap_save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Move:
    """Return where every weight may go, and its way back; one that others can see stays where it is."""
    from samopt.kernels.triton import swapped

    return swapped.save(block, consume, spare)


def swap_ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Move | None = None) -> None:
    """Write the perturbed weights elsewhere and point each weight there; without ``saved``, in place."""
    from samopt.kernels.triton import swapped

    swapped.ascend(block, scale, noise, saved)


def swap_climb(
    block: Block, length: Tensor, stride: Stride, noise: NoiseSource | None, saved: Move
) -> Callable[[], Tensor]:
    """Do ``swap_ascend`` with the step's arithmetic on the device; return what gives its norm."""
    from samopt.kernels.triton import swapped

    return swapped.climb(block, length, stride, noise, saved)


def swap_restore(saved: Move) -> None:
    """Point the weights back to their own memory, and copy those back that stayed."""
    from samopt.kernels.triton import swapped

    swapped.restore(saved)


def refuses(base: Optimizer) -> str | None:
    """Return why no kernel takes the step of ``base``, or None where one does."""
    if type(base) not in _BASES:
        return f"{type(base).__name__} is none of torch's SGD, Adam and AdamW"
    if "step" in vars(base):
        return f"the step method of this {type(base).__name__} was replaced, as by a scheduler made for it"
    for group in base.param_groups:
        if group.get("differentiable") or any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            return f"this {type(base).__name__} is differentiable or has tensors for betas"
    return None


def restore_and_step(base: Optimizer, ways: Sequence[Way]) -> bool:
    """Restore and take the base's step in one pass over memory; return whether it was done."""
    from samopt.kernels.triton import fused

    return fused.restore_and_step(base, ways)
