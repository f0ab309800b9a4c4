"""The loss along random directions through the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samopt._numerics.low_precision import widen
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, MeasuredModel, measuring
from samopt.sharpness._measuring.optimizer_parts import MovableWeights, vector_norm
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result, largest
from samopt.sharpness._measuring.seeds import stream
from samopt.sharpness._measuring.style import BLUE, GREY
from samopt.sharpness._measuring.weights import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NORMALIZATIONS", "Landscape", "landscape"]

NORMALIZATIONS = ("filter", "layer", "none")


@dataclass(frozen=True)
class Landscape(Result):
    """What ``landscape`` returns; ``value`` is the largest rise of the loss above its value at the weights.

    It is NaN where a loss on the grid is.

    Attributes:
        positions: Places along each direction, in units of the normalised direction.
        losses: Mean loss at each place: a row of them, or with two directions a row for each place along the first.
        centre: Mean loss at the weights.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...] | tuple[tuple[float, ...], ...]
    centre: float

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw a curve, or contours of the loss.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        axes.set_xlabel("first direction (1: as long as the weights)")
        if not isinstance(self.losses[0], tuple):
            axes.plot(self.positions, self.losses, color=color, label=label)
            axes.axvline(0, color=GREY, linewidth=0.5)
            axes.set_ylabel("loss")
            return
        across = list(zip(*self.losses, strict=True))
        shades = axes.contourf(self.positions, self.positions, across, levels=20, cmap="cividis")
        axes.plot([0], [0], "w+", markersize=10)
        axes.set_ylabel("second direction")
        axes.set_aspect("equal")
        axes.figure.colorbar(shades, ax=axes, label="loss")


def landscape(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    dimensions: int = 1,
    points: int = 21,
    radius: float = 1.0,
    normalization: str = "filter",
    directions: Sequence[Sequence[Tensor]] | None = None,
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    progress: ProgressOption = None,
) -> Landscape:
    """Return the loss at ``w + a d1`` or ``w + a d1 + b d2``, for a and b from ``-radius`` to ``radius``.

    The directions are normal random numbers, scaled so that each filter (row of a weight's first dimension) has the
    norm of the model's own; tensors of dim <= 1 do not move. So 1 is a change as large as the weights. Source: Li et
    al. 2018, "Visualizing the Loss Landscape of Neural Nets", section 4.

    Misleads: a random direction among a million dimensions meets almost none of the curvature, and two of them are
    an illustration. A plane shows differences between models only with the same ``seed`` and one colour scale.

    Cost: ``points ** dimensions / 3`` gradients a batch. Memory: one copy of the weights, and one a direction.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches; means weigh examples.
        dimensions: 1 or 2.
        points: Places along each direction, >= 3 and odd, so that the weights themselves are one.
        radius: How far to go, > 0.
        normalization: "filter"; "layer" for the norm of each whole tensor; "none" for the norm of all weights together.
        directions: Own directions instead, not normalised: for each a tensor for every moving parameter, in order.
        parameters: Names or patterns of the parameters that move; None for every trainable one.
        mode: "eval", "train", or "keep".
        seed: Decides the directions.
        progress: See ``ProgressOption``.

    Returns:
        The losses on the grid.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or a direction does not fit.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 4.0]])
        >>> def loss_fn(model, batch):
        ...     return model.weight.square().sum()
        >>> result = sharpness.landscape(model, loss_fn, [None], points=3, directions=[[torch.tensor([[1.0, 0.0]])]])
        >>> result.losses
        (20.0, 25.0, 32.0)
    """
    if dimensions not in (1, 2):
        raise ValueError(f"dimensions must be 1 or 2, got {dimensions}")
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, so that the weights themselves are one; got {points}")
    if not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f'normalization must be "filter", "layer" or "none", got {normalization!r}')
    if directions is not None:
        dimensions = len(directions)
        if dimensions not in (1, 2):
            raise ValueError(f"directions must be one or two, each with a tensor for every parameter; got {dimensions}")
    middle = points // 2
    positions = [radius * (point - middle) / middle for point in range(points)]
    with measuring(
        model,
        loss_fn,
        batches,
        name="loss landscape",
        parameters=parameters,
        mode=mode,
        cost_per_batch=points**dimensions * FORWARD,
        progress=progress,
    ) as measured:
        if directions is None:
            axes = [_random_direction(measured, normalization, (seed, index)) for index in range(dimensions)]
        else:
            axes = [_checked(measured, direction) for direction in directions]
        if not any(part.count_nonzero() for part in axes[0]):
            warnings.warn(
                "no weight moves along the first direction, so the landscape is flat: it is 0, or the parameters have "
                'less than two dimensions, which normalization="filter" leaves in place',
                stacklevel=2,
            )
        with measured.movable_weights() as movable:
            rows = [
                [_loss_at(measured, movable, axes, (first, second)) for second in (positions if axes[1:] else [0.0])]
                for first in positions
            ]
        cost = measured.progress.cost
    centre = rows[middle][middle if axes[1:] else 0]
    return Landscape(
        measure="landscape",
        value=largest(loss for row in rows for loss in row) - centre,
        standard_error=None,
        cost=cost,
        settings={"radius": radius, "normalization": normalization, **measured.settings, "seed": seed},
        positions=tuple(positions),
        losses=tuple(tuple(row) for row in rows) if axes[1:] else tuple(row[0] for row in rows),
        centre=centre,
    )


def _loss_at(
    measured: MeasuredModel, movable: MovableWeights, axes: Sequence[Sequence[Tensor]], at: Sequence[float]
) -> float:
    for index, origin in enumerate(movable.origin):
        offset = torch.zeros_like(origin, dtype=widen(origin).dtype)
        for direction, length in zip(axes, at, strict=False):
            offset.add_(direction[index], alpha=length)
        movable.move(index, offset)
    return measured.mean_loss()


def _random_direction(measured: MeasuredModel, normalization: str, key: tuple[int, int]) -> list[Tensor]:
    direction = []
    for index, weight in enumerate(measured.weights):
        own = widen(weight.detach())
        generator = stream(own.device, "direction", *key, index)
        drawn = torch.randn(own.shape, generator=generator, device=own.device, dtype=own.dtype)
        if normalization == "filter":
            drawn = _like_filters(drawn, own) if own.dim() > 1 else torch.zeros_like(own)
        elif normalization == "layer":
            drawn.mul_(own.norm() / drawn.norm().clamp_min(torch.finfo(drawn.dtype).tiny))
        direction.append(drawn)
    if normalization == "none":
        size = math.hypot(*(float(vector_norm(widen(weight.detach()))) for weight in measured.weights))
        drawn_size = math.hypot(*(float(vector_norm(drawn)) for drawn in direction))
        for drawn in direction:
            drawn.mul_(size / drawn_size)
    return direction


def _like_filters(drawn: Tensor, own: Tensor) -> Tensor:
    scale = own.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1).clamp_min(torch.finfo(drawn.dtype).tiny)
    return drawn.mul_(scale.view(-1, *[1] * (own.dim() - 1)))


def _checked(measured: MeasuredModel, direction: Sequence[Tensor]) -> list[Tensor]:
    given, wanted = [list(d.shape) for d in direction], [list(w.shape) for w in measured.weights]
    if given != wanted:
        raise ValueError(
            f"a direction needs a tensor for each of the {len(wanted)} parameters that move, of shapes {wanted[:4]}"
            f"{' ...' if len(wanted) > 4 else ''}; got {given[:4]}{' ...' if len(given) > 4 else ''}"
        )
    return [d.detach().to(w.device, widen(w).dtype) for d, w in zip(direction, measured.weights, strict=True)]
