"""Launches of the norm, the ascent and the restore over blocks of tensors; no launch waits for the device."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from samopt._numerics.low_precision import is_low_precision
from samopt.kernels.block import Block, NoiseSource, Norms, StepSize
from samopt.kernels.memory import bump_versions
from samopt.kernels.triton import stages
from samopt.kernels.triton.availability import interprets
from samopt.kernels.triton.backup import TritonBackup
from samopt.kernels.triton.tables import CHUNK, PointerTable, addresses_of, boundaries, pointer_table

__all__ = ["BLOCK", "DTYPES", "OPTIONS", "ascend", "backup", "measure", "restore"]

BLOCK = 1024  # elements at a time: eight for each of the 128 threads of a program, 128 bits in bf16 and twice in fp32
_SUMS = 1024  # sums that the one program of a second stage reads at a time
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BITS = {4: tl.uint32, 2: tl.uint16}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 128  # far more than any kernel needs; without it, ptxas saves registers by spilling one

_stamps = itertools.count(secrets.randbits(62))  # random, so that unused memory holds none of them by chance


def measure(blocks: Sequence[Block]) -> Norms:
    """Return the norms of blocks of one device: a launch for each block, and one that joins them."""
    device = blocks[0].weights[0].device
    tables = [_table_of(block, block.directions) for block in blocks]
    counts = tuple(table.chunks for table in tables)
    total = sum(counts)
    sums = torch.empty(2, total, dtype=torch.float64, device=device)
    lengths = torch.empty(3 + len(blocks), dtype=torch.float64, device=device)
    with _on(device):
        for index, (block, table) in enumerate(zip(blocks, tables, strict=True)):
            if table.chunks:
                stages.sum_chunk[(table.chunks,)](
                    table.data, table.chunks, sums, total, sum(counts[:index]), block.eta, block.eta**0.5,
                    DTYPE=DTYPES[block.weights[0].dtype], GEOMETRY=_geometry(block), BLOCK=BLOCK, **OPTIONS,
                )  # fmt: skip
        stages.join_sums[(1,)](
            sums, total, boundaries(counts, device), len(blocks), lengths, BLOCK=_SUMS, **OPTIONS
        )  # fmt: skip
    return Norms(lengths[0], lengths[1], lengths[2], list(lengths[3:]))


def backup(block: Block, values: list[Tensor]) -> TritonBackup:
    """Return a backup that the next ascent of ``block`` fills.

    Args:
        block: The weights.
        values: Memory for the old value of each weight, with its memory layout.
    """
    table = _table_of(block, values)
    written = torch.empty(table.chunks, dtype=torch.int64, device=block.weights[0].device)
    return TritonBackup(block.weights, values, table, written, next(_stamps))


def ascend(
    block: Block,
    step: StepSize,
    length: Tensor,
    noise: NoiseSource | None,
    *,
    into: list[Tensor] | None = None,
    backup: TritonBackup | None = None,
) -> Tensor:
    """Write ``w + scale T^2 d`` (l2) or ``w + scale T sign(d)`` (l-infinity), with the scale computed on the device.

    Args:
        block: Tensors to move.
        step: How far.
        length: ``||T d||_2`` over the block, 0-dim fp64 on its device.
        noise: Uniform numbers for stochastic rounding, or None.
        into: Memory for the result, with the layout of the weights; None is the weights themselves.
        backup: Takes the old weights in the same launch; not together with ``into``.

    Returns:
        The norm of the move, 0-dim: measured after rounding for low-precision weights, else the one asked for.
    """
    device, radius = block.weights[0].device, step.radius
    table = _table_of(block, block.directions if into is None else into) if backup is None else backup.table
    if not table.chunks:
        return torch.zeros((), dtype=torch.float64, device=device)
    is_low = is_low_precision(block.weights[0])
    applied = torch.empty(table.chunks if is_low else 1, dtype=torch.float64, device=device)
    number, address = (0.0, radius.to(device, non_blocking=True)) if isinstance(radius, Tensor) else (radius, None)
    key = noise.key() if noise is not None and is_low else 0
    with _on(device):
        stages.ascend_chunk[(table.chunks,)](
            table.data, table.chunks, step.norm.to(device, non_blocking=True), length, float(number), address,
            step.sign, block.eta, block.eta**0.5, _signed(key & 0xFFFFFFFF), _signed(key >> 32),
            None if backup is None else backup.written, 0 if backup is None else backup.stamp, applied,
            DTYPE=DTYPES[block.weights[0].dtype], GEOMETRY=_geometry(block), LINF=block.linf,
            ON_DEVICE=address is not None, SAVES=backup is not None, INTO=into is not None,
            STOCHASTIC=noise is not None and is_low, MEASURED=is_low, INTERPRETED=interprets(), CHUNK=CHUNK,
            BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        bump_versions(block.weights if into is None else into)  # autograd does not see what a kernel writes
        if is_low:
            sizes, applied = applied, torch.empty(1, dtype=torch.float64, device=device)
            stages.join_moves[(1,)](sizes, len(sizes), applied, LINF=block.linf, BLOCK=_SUMS, **OPTIONS)
    return applied[0]


def restore(saved: TritonBackup) -> None:
    """Copy the old weights back, bit for bit, where the device has saved them; may run again."""
    table = saved.table
    if not table.chunks:
        return
    with _on(saved.written.device):
        stages.restore_chunk[(table.chunks,)](
            table.data, table.chunks, saved.written, saved.stamp,
            DTYPE=_BITS[saved.values[0].element_size()], BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    bump_versions(saved.weights)


def _table_of(block: Block, third: Sequence[Tensor]) -> PointerTable:
    """Return the table of the weights, their directions and a third list of tensors with the same layout."""
    weights = block.weights
    addresses = addresses_of(weights), addresses_of(block.directions), addresses_of(third)
    return pointer_table(addresses, (CHUNK * weights[0].element_size(),) * 3, tuple(block.sizes), weights[0].device)


def _geometry(block: Block) -> str:
    """Return the name that the kernels know the geometry by."""
    return "none" if block.geometry is None else block.geometry.name


def _signed(bits: int) -> int:
    """Return 32 bits as the number that a signed integer with these bits is."""
    return bits - 2**32 if bits >= 2**31 else bits


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which launches go to ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
