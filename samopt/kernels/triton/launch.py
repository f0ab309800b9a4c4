"""Launches of the norm, the ascent, the restore over blocks of tensors; no launch waits for the device."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from samopt._numerics.low_precision import is_low_precision
from samopt.kernels.block import Block, Lengths, NoiseSource, Saved, Stride
from samopt.kernels.memory import NEW_MEMORY, Spare, note_writes, room_for
from samopt.kernels.triton import stages
from samopt.kernels.triton.availability import interprets
from samopt.kernels.triton.tables import CHUNK, PointerTable, addresses_of, boundaries, count_chunks, pointer_table
from samopt.step_metrics import Known

__all__ = [
    "BLOCK",
    "DTYPES",
    "OPTIONS",
    "Way",
    "ascend",
    "climb",
    "measure",
    "norm",
    "on",
    "restore",
    "save",
]

BLOCK = 1024  # elements at a time: eight for each of the 128 threads of a program, 128 bits in bf16 and twice in fp32
_SUMS = 1024  # sums that the one program of a second stage reads at a time
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BITS = {4: tl.uint32, 2: tl.uint16}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 128  # far more than any kernel needs; without it, ptxas saves registers by spilling one

_stamps = itertools.count(secrets.randbits(62))  # what memory may hold by chance is none of them


@dataclass
class Way(Saved):
    """A way back: where the old weights are, once the device has written them there.

    Attributes:
        weights: The weights.
        rooms: Memory for the old value of each.
        table: Their addresses.
        written: int64 on the device, one for each chunk: ``stamp`` while its backup holds the old weights.
        stamp: A number that no other ascent has.
    """

    weights: list[Tensor]
    rooms: list[Tensor]
    table: PointerTable
    written: Tensor
    stamp: int


def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor."""
    return measure([block]).norm


def measure(blocks: Sequence[Block]) -> Lengths:
    """Return the norms of blocks of one device and metric: a launch for each block, and one that joins them."""
    device = blocks[0].weights[0].device
    tables = [_table_of(block, block.directions) for block in blocks]
    counts = tuple(table.chunks for table in tables)
    total = sum(counts)
    sums = torch.empty(2, total, dtype=torch.float64, device=device)
    lengths = torch.empty(3 + len(blocks), dtype=torch.float64, device=device)
    with on(device):
        for index, (block, table) in enumerate(zip(blocks, tables, strict=True)):
            if table.chunks:
                stages.sum_chunk[(table.chunks,)](
                    table.data, table.chunks, sums, total, sum(counts[:index]), block.eta, block.eta**0.5,
                    DTYPE=DTYPES[block.weights[0].dtype], METRIC=_metric(block), BLOCK=BLOCK, **OPTIONS,
                )  # fmt: skip
        stages.join_sums[(1,)](
            sums, total, boundaries(counts, device), len(blocks), lengths, BLOCK=_SUMS, **OPTIONS
        )  # fmt: skip
    return Lengths(lengths[0], lengths[1], lengths[2], list(lengths[3:]))


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Way:
    """Return room for every weight: its direction's memory where that may be overwritten, else other memory."""
    rooms = [
        room_for(weight, direction, consume, spare)
        for weight, direction in zip(block.weights, block.directions, strict=True)
    ]
    table = _table_of(block, rooms)
    written = torch.empty(table.chunks, dtype=torch.int64, device=block.weights[0].device)
    return Way([], block.weights, rooms, table, written, next(_stamps))


def ascend(
    block: Block,
    scale: Tensor,
    noise: NoiseSource | None,
    saved: Way | None = None,
    rooms: Sequence[Tensor] | None = None,
) -> None:
    """Write ``w + scale T^2 d`` (l2) or ``w + scale T sign(d)`` (l-infinity), and the old ``w`` into ``saved``.

    Args:
        block: Tensors to move.
        scale: The factor, 0-dim.
        noise: Uniform numbers for stochastic rounding, or None.
        saved: From ``save``, or None.
        rooms: Where to write instead of over the weights, or None; there is no ``saved`` then.
    """
    _ascend(block, saved, noise, rooms=rooms, radius_at=scale.to(block.weights[0].device, non_blocking=True))


def climb(
    block: Block,
    length: Tensor,
    stride: Stride,
    noise: NoiseSource | None,
    saved: Way | None = None,
    rooms: Sequence[Tensor] | None = None,
) -> Callable[[], Tensor]:
    """Ascend as far as ``stride`` says, with its arithmetic on the device.

    Args:
        block: Tensors to move.
        length: ``||T d||_2`` over the block, 0-dim fp64 on its device.
        stride: How far.
        noise: Uniform numbers for stochastic rounding, or None.
        saved: From ``save``, or None.
        rooms: As for ``ascend``.

    Returns:
        Gives the norm of the move, 0-dim: measured after rounding for low-precision weights, in a launch of its own
        when it is asked for; else the one asked for.
    """
    device, radius = block.weights[0].device, stride.radius
    chunks = count_chunks(block.sizes)
    if not chunks:
        return partial(torch.zeros, (), dtype=torch.float64, device=device)
    measured = is_low_precision(block.weights[0])
    applied = torch.empty(chunks if measured else 1, dtype=torch.float64, device=device)
    number, where = (0.0, radius.to(device, non_blocking=True)) if isinstance(radius, Tensor) else (float(radius), None)
    _ascend(
        block,
        saved,
        noise,
        rooms=rooms,
        norm=stride.norm.to(device, non_blocking=True),
        own_length=length,
        radius=number,
        radius_at=where,
        sign=stride.sign,
        applied=applied,
        measured=measured,
    )
    return partial(_length_of_move, applied, block.linf) if measured else Known(applied[0])


def restore(saved: Way) -> None:
    """Copy the saved weights back, bit for bit, if the device has saved them; may run again."""
    table = saved.table
    if not table.chunks:
        return
    with on(saved.written.device):
        stages.restore_chunk[(table.chunks,)](
            table.data, table.chunks, saved.written, saved.stamp,
            DTYPE=_BITS[saved.weights[0].element_size()], BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    note_writes(saved.weights)


def _ascend(
    block: Block,
    saved: Way | None,
    noise: NoiseSource | None,
    *,
    rooms: Sequence[Tensor] | None = None,
    norm: Tensor | None = None,
    own_length: Tensor | None = None,
    radius: float = 0.0,
    radius_at: Tensor | None = None,
    sign: int = 1,
    applied: Tensor | None = None,
    measured: bool = False,
) -> None:
    """Launch the ascent; without a norm, the radius is the scale."""
    table = _table_of(block, block.directions if rooms is None else rooms) if saved is None else saved.table
    if not table.chunks:
        return
    stochastic = noise is not None and is_low_precision(block.weights[0])
    key = noise.key() if noise is not None and stochastic else 0
    with on(block.weights[0].device):
        stages.ascend_chunk[(table.chunks,)](
            table.data, table.chunks, norm, own_length, radius, radius_at, sign, block.eta, block.eta**0.5,
            _signed(key & 0xFFFFFFFF), _signed(key >> 32),
            None if saved is None else saved.written, 0 if saved is None else saved.stamp, applied,
            DTYPE=DTYPES[block.weights[0].dtype], METRIC=_metric(block), LINF=block.linf,
            SCALED=norm is None, ON_DEVICE=radius_at is not None, SAVES=saved is not None, AWAY=rooms is not None,
            STOCHASTIC=stochastic, MEASURED=measured, INTERPRETED=interprets(), CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    if rooms is None:
        note_writes(block.weights)


def _length_of_move(sizes: Tensor, linf: bool) -> Tensor:
    whole = torch.empty(1, dtype=torch.float64, device=sizes.device)
    with on(sizes.device):
        stages.join_moves[(1,)](sizes, len(sizes), whole, LINF=linf, BLOCK=_SUMS, **OPTIONS)
    return whole[0]


def _table_of(block: Block, rooms: Sequence[Tensor]) -> PointerTable:
    weights = block.weights
    sizes = tuple(weight.numel() for weight in weights)
    addresses = addresses_of(weights), addresses_of(block.directions), addresses_of(rooms)
    return pointer_table(addresses, (CHUNK * weights[0].element_size(),) * 3, sizes, weights[0].device)


def _metric(block: Block) -> str:
    return "none" if block.metric is None else block.metric.name


def _signed(bits: int) -> int:
    """Return 32 bits as the number that a signed integer with these bits is."""
    return bits - 2**32 if bits >= 2**31 else bits


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which launches go to ``device``.

    Args:
        device: Where the tensors are.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
