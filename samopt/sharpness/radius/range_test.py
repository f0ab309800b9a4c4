"""What a radius does to the loss and to the gradient, at given weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samopt._numerics.low_precision import widen
from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt.sharpness._measuring.losses import LossFn
from samopt.sharpness._measuring.measured_model import measuring
from samopt.sharpness._measuring.results import mean_and_error
from samopt.sharpness.curvature.operators import dot
from samopt.sharpness.nearby.ball import AdaptiveOption, Ball

__all__ = ["range_test"]


def range_test(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], radii: Sequence[float], adaptive: AdaptiveOption
) -> tuple[list[float], list[float]]:
    """Return for each radius the rise of the loss after SAM's ascent, and the cosine between both gradients.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: Batches; means weigh examples.
        radii: The radii, > 0.
        adaptive: The geometry of the ball, as for ``worst_case``.
    """
    rises: list[list[float]] = [[] for _ in radii]
    cosines: list[list[float]] = [[] for _ in radii]
    with measuring(model, loss_fn, batches, name="range test", mode="train", progress=False) as measured:
        noise = RoundingNoise(0)
        with measured.movable_weights() as movable:
            for batch in measured.batches:
                movable.undo()
                loss, found = measured.gradient(batch)
                gradient = _dense(found)
                for index, radius in enumerate(radii):
                    movable.undo()
                    ball = Ball(radius, "l2", adaptive, 0.01 if adaptive else 0.0)
                    offsets = [
                        torch.zeros_like(weight) if part is None else widen(part).clone()
                        for part, weight in zip(gradient, movable.origin, strict=True)
                    ]
                    noise.advance()
                    if not 0 < ball.uphill(offsets, movable.origin, radius) < math.inf:
                        continue
                    for number, offset in enumerate(offsets):
                        movable.move(number, offset, noise.source())
                    there, found = measured.gradient(batch)
                    perturbed = _dense(found)
                    rises[index].append(float(there - loss))
                    cosines[index].append(_cosine(gradient, perturbed))
        sizes = measured.sizes
    return (
        [mean_and_error(row, sizes)[0] if len(row) == len(sizes) else math.nan for row in rises],
        [mean_and_error(row, sizes)[0] if len(row) == len(sizes) else math.nan for row in cosines],
    )


def _dense(gradient: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [part.to_dense() if part is not None and part.is_sparse else part for part in gradient]


def _flat(part: Tensor) -> Tensor:
    return torch.view_as_real(part).reshape(-1) if part.is_complex() else part.reshape(-1)


def _cosine(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    pairs = [
        (_flat(widen(a)), _flat(widen(b))) for a, b in zip(one, other, strict=True) if a is not None and b is not None
    ]
    lengths = [math.fsum(dot(part, part) for part in side) for side in zip(*pairs, strict=True)]
    product = math.fsum(dot(a, b) for a, b in pairs)
    scale = math.sqrt(lengths[0] * lengths[1])
    return product / scale if scale > 0 else math.nan
