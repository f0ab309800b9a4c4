"""The specification: the norm and the ascent, one tensor at a time, beside their equations."""

from __future__ import annotations

import torch
from torch import Tensor

from samopt._numerics.low_precision import is_low_precision, widen
from samopt._numerics.vector_norm import vector_norm
from samopt.kernels.block import Block, NoiseSource, StepSize

__all__ = ["ascend", "norm", "split_sparse", "supports"]

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_MIN_EXPONENT = {torch.bfloat16: -119, torch.float16: -14}  # keeps the spacing a normal fp32 number
_SMALLEST = {torch.bfloat16: 2.0**-119, torch.float16: 0.0}  # what is smaller is rounded to nearest


def supports(block: Block) -> str | None:
    """Return None: the reference runs everything."""
    return None


def norm(block: Block) -> Tensor:
    """Return ``||T d||_2`` over the block: a 0-dim fp64 tensor on the block's device, safe at 1e30 and at 1e-30."""
    norms = []
    for index, (weight, direction) in enumerate(zip(block.weights, block.directions, strict=True)):
        rows, values = split_sparse(direction)
        values = widen(values)
        t = None if block.geometry is None else block.scale(index, widen(_take(weight, rows)), values, rows)
        norms.append(vector_norm(values if t is None else values * t))
    return vector_norm(torch.stack(norms))


def ascend(
    block: Block, step: StepSize, length: Tensor, noise: NoiseSource | None, *, into: list[Tensor] | None = None
) -> Tensor | None:
    """Write ``w + scale T^2 d`` (l2) or ``w + scale T sign(d)`` (l-infinity), computed in at least fp32.

    Args:
        block: Tensors to move.
        step: How far: ``scale`` is ``r / ||T d||`` (l2) or ``r`` (l-infinity), or 0 where nothing moves.
        length: ``||T d||_2`` over the block.
        noise: Uniform numbers for stochastic rounding of low-precision weights; None rounds to nearest.
        into: Memory for the result, like each weight; None is the weights themselves.

    Returns:
        The norm of the move after rounding, ``||T^-1 (w' - w)||_2`` or its largest entry, for low-precision weights;
        None for others, which move as far as ``step`` says.
    """
    scale = step.scale(block.weights[0].device)
    targets = block.weights if into is None else into
    is_low = is_low_precision(block.weights[0])
    applied = []
    for index, (weight, direction, target) in enumerate(zip(block.weights, block.directions, targets, strict=True)):
        rows, values = split_sparse(direction)
        start, values = widen(_take(weight, rows)), widen(values)
        uphill = torch.sgn(values) if block.linf else values
        t = block.scale(index, start, values, rows)
        if t is not None:
            uphill = uphill * t if block.linf else uphill * t * t  # T^2 alone may underflow
        factor = scale.to(start.real.dtype if start.is_complex() else start.dtype)
        # 0 times infinity is nan, so a scale of 0 is asked for by name.
        moved = start + torch.where(factor != 0, uphill * factor, torch.zeros_like(uphill))
        if is_low:
            moved = moved.to(weight.dtype) if noise is None else _round_stochastically(moved, weight.dtype, noise)
            applied.append(_size(moved.float() - start, t, block.linf))
        if rows is None:
            target.copy_(moved)
        else:
            if into is not None:
                target.copy_(weight)
            target[rows] = moved.to(target.dtype)
    if not applied:
        return None
    return torch.stack(applied).amax() if block.linf else vector_norm(torch.stack(applied))


def split_sparse(direction: Tensor) -> tuple[tuple[Tensor, ...] | None, Tensor]:
    """Separate a sparse direction into the rows it touches and their values; a dense one touches everything."""
    if not direction.is_sparse:
        return None, direction
    direction = direction.coalesce()
    return tuple(direction.indices()), direction.values()


def _take(weight: Tensor, rows: tuple[Tensor, ...] | None) -> Tensor:
    """Return the rows of a weight; None is all of it."""
    return weight.detach() if rows is None else weight.detach()[rows]


def _size(move: Tensor, t: Tensor | None, linf: bool) -> Tensor:
    """Return ``||T^-1 move||_2``, or its largest entry, in fp64."""
    if t is not None:
        move = torch.where(move != 0, move / t, move)  # T is 0 where Fisher's direction is infinite
    return move.abs().amax().double() if linf and move.numel() else vector_norm(move)


def _round_stochastically(values: Tensor, dtype: torch.dtype, noise: NoiseSource) -> Tensor:
    """Round fp32 ``values`` to a neighbour in ``dtype``, up with probability equal to the fraction that is lost."""
    # The spacing of the dtype around a value is a power of two, so dividing by it is exact, and so is splitting the
    # quotient into floor(q) and the fraction that decides. A representable value has fraction 0 and stays.
    _, exponent = torch.frexp(values)
    spacing_exponent = (exponent - 1).clamp_(min=_MIN_EXPONENT[dtype]) - _MANTISSA_BITS[dtype]
    spacing = torch.ldexp(torch.ones_like(values), spacing_exponent)
    quotient = values / spacing
    below = quotient.floor()
    rounded = (below + (noise(values) < quotient - below)) * spacing
    largest = torch.finfo(dtype).max
    decided = torch.isfinite(values) & (values.abs() >= _SMALLEST[dtype])
    return torch.where(decided, rounded.clamp_(-largest, largest), values).to(dtype)
