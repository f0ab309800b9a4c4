"""The specification: each operation of a two-step update, one tensor at a time, beside its equation."""

from __future__ import annotations

import torch
from torch import Tensor

from samopt._numerics.low_precision import is_low_precision, widen
from samopt.kernels.block import Backup, Block, NoiseSource, Saved
from samopt.kernels.memory import NEW_MEMORY, Spare

__all__ = ["ascend", "norm", "restore", "save", "supports", "vector_norm"]

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_MIN_EXPONENT = {torch.bfloat16: -119, torch.float16: -14}  # keeps the spacing a normal fp32 number
_SMALLEST = {torch.bfloat16: 2.0**-119, torch.float16: 0.0}  # what is smaller is rounded to nearest


def supports(block: Block) -> str | None:
    """Return None: the reference runs everything."""
    return None


def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor on the block's device, safe at 1e30 and at 1e-30."""
    lengths = []
    for weight, direction in zip(block.weights, block.directions, strict=True):
        rows, values = _split(direction)
        values = widen(values)
        if block.metric is not None:
            values = values * block.metric.scale(widen(_take(weight, rows)), values, block.eta)
        lengths.append(vector_norm(values))
    return vector_norm(torch.stack(lengths))


def save(block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> Saved:
    """Return copies of every value that ``ascend`` will write."""
    backups = []
    for weight, direction in zip(block.weights, block.directions, strict=True):
        rows, _ = _split(direction)
        values = _take(weight, rows)
        backups.append(Backup(weight, rows, spare.like(values).copy_(values)))
    return Saved(backups)


def ascend(block: Block, scale: Tensor, noise: NoiseSource | None, saved: Saved | None = None) -> None:
    """Write ``w + scale T^2 d`` (l2) or ``w + scale T sign(d)`` (l-infinity), computed in at least fp32.

    Args:
        block: Tensors to move; ``block.weights`` is written.
        scale: 0-dim tensor: ``r / ||T d||`` (l2) or ``r`` (l-infinity); 0 moves nothing, whatever ``d`` holds.
        noise: Uniform numbers for stochastic rounding of low-precision weights; None rounds to nearest.
        saved: What ``save`` returned, for backends that save while they ascend.
    """
    for weight, direction in zip(block.weights, block.directions, strict=True):
        rows, values = _split(direction)
        start, values = widen(_take(weight, rows)), widen(values)
        uphill = torch.sgn(values) if block.linf else values
        if block.metric is not None:
            length = block.metric.scale(start, values, block.eta)
            uphill = uphill * length if block.linf else uphill * length * length  # T^2 alone may underflow
        step = scale.to(start.real.dtype if start.is_complex() else start.dtype)
        target = start + torch.where(step != 0, uphill * step, torch.zeros_like(uphill))
        if noise is not None and is_low_precision(weight):
            target = _round_stochastically(target, weight.dtype, noise)
        if rows is None:
            weight.copy_(target)
        else:
            weight[rows] = target.to(weight.dtype)


def restore(saved: Saved) -> None:
    """Copy the saved values back, bit for bit."""
    for backup in saved.backups:
        if backup.rows is None:
            backup.weight.copy_(backup.values)
        else:
            backup.weight[backup.rows] = backup.values


def vector_norm(values: Tensor) -> Tensor:
    """Return the l2 norm of ``values`` as a 0-dim fp64 tensor (fp32 where the device has no fp64).

    Squares are accumulated in fp64, where no square of a finite fp32 value overflows or vanishes; fp64 values are
    divided by their largest magnitude first.
    """
    if values.numel() == 0:
        return torch.zeros((), dtype=_wide(values.device), device=values.device)
    if values.dtype in (torch.float64, torch.complex128) or _wide(values.device) is not torch.float64:
        peak = values.abs().amax()
        usable = torch.isfinite(peak) & (peak > 0)
        unit = torch.where(usable, peak, torch.ones_like(peak))
        return torch.where(usable, peak * torch.linalg.vector_norm(values / unit), peak)
    wide = torch.complex128 if values.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide)
    return norm


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _split(direction: Tensor) -> tuple[tuple[Tensor, ...] | None, Tensor]:
    """Separate a sparse direction into the rows it touches and their values; a dense one touches everything."""
    if not direction.is_sparse:
        return None, direction
    direction = direction.coalesce()
    return tuple(direction.indices()), direction.values()


def _take(weight: Tensor, rows: tuple[Tensor, ...] | None) -> Tensor:
    return weight.detach() if rows is None else weight.detach()[rows]


def _round_stochastically(values: Tensor, dtype: torch.dtype, noise: NoiseSource) -> Tensor:
    """Round fp32 ``values`` to a neighbour in ``dtype``, up with probability equal to the fraction that is lost.

    The spacing of ``dtype`` around a value is a power of two, so dividing by it is exact, and so is splitting the
    quotient into ``floor(q)`` and the fraction that decides. A representable value has fraction 0 and stays.

    Returns:
        The rounded values, in ``dtype``.
    """
    _, exponent = torch.frexp(values)
    spacing_exponent = (exponent - 1).clamp_(min=_MIN_EXPONENT[dtype]) - _MANTISSA_BITS[dtype]
    spacing = torch.ldexp(torch.ones_like(values), spacing_exponent)
    quotient = values / spacing
    below = quotient.floor()
    rounded = (below + (noise(values) < quotient - below)) * spacing
    largest = torch.finfo(dtype).max
    decided = torch.isfinite(values) & (values.abs() >= _SMALLEST[dtype])
    return torch.where(decided, rounded.clamp_(-largest, largest), values).to(dtype)
