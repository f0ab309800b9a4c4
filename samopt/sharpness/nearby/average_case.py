"""Average-case sharpness: how much the loss rises under random perturbations of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, measuring
from samopt.sharpness._measuring.optimizer_parts import MovableWeights
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result, mean_and_error
from samopt.sharpness._measuring.seeds import seed_of, stream
from samopt.sharpness._measuring.style import BLUE
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.nearby.ball import AdaptiveOption, Ball

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AverageCase", "average_case"]


@dataclass(frozen=True)
class AverageCase(Result):
    """What ``average_case`` returns.

    ``value`` is the mean over batches and samples. Its error is that of the mean over batches, whose noise is
    independent; with one batch, that of the mean over samples.

    Attributes:
        loss: Mean loss at the weights themselves.
        per_batch: Mean rise on each batch.
        per_sample: Rise of each sample, averaged over its two signs, batch after batch.
    """

    loss: float
    per_batch: tuple[float, ...]
    per_sample: tuple[float, ...]

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the distribution of the rises over batches and samples.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        axes.hist(self.per_sample, bins="auto", color=color, alpha=0.4)
        axes.axvline(self.value, color=color, label=f"{label or 'mean'}: {self.value:.4g}")
        axes.set_xlabel(f"rise of the loss under noise of scale rho = {self.settings['rho']:g}")
        axes.set_ylabel("number of samples")


def average_case(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    norm: str = "l2",
    adaptive: AdaptiveOption = False,
    eta: float = 0.0,
    samples: int = 10,
    m: int | None = None,
    normalize_logits: bool = False,
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    progress: ProgressOption = None,
) -> AverageCase:
    """Return the mean over examples of ``E[L(w + T u)] - L(w)`` with ``u ~ N(0, rho^2)`` elementwise.

    With ``norm="linf"``, ``u`` is uniform in ``[-rho, rho]``, for complex weights in the disc. Every ``u`` is used
    with both signs, which removes the gradient's share of the sampling error. Unlike the worst case the value may
    be negative. Its scale differs, too: the norm of ``u`` is about ``rho sqrt(d)`` for d weights. Source:
    Andriushchenko et al. 2023, section 3.

    To second order the value is ``rho^2 / 2 * trace(T H T)``: one number for all directions, most of them flat.

    Misleads: the same ``rho`` is a much larger move than in the worst case, so the two are not on one scale. A wide
    network is moved further than a narrow one. A few sharp directions among millions hardly show.

    Cost: ``(2 * samples + 1) / 3`` gradients a batch. Memory: one copy of the weights that move.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches.
        rho: Scale of the noise, >= 0.
        norm: "l2" for normal, "linf" for uniform noise.
        adaptive: As for ``worst_case``.
        eta: As for ``worst_case``.
        samples: Draws of the noise for each batch, >= 1.
        m: As for ``worst_case``.
        normalize_logits: As for ``worst_case``.
        parameters: As for ``worst_case``.
        mode: "eval", "train", or "keep".
        seed: Decides the noise.
        progress: See ``ProgressOption``.

    Returns:
        The sharpness, with its standard error and cost.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the loss at the weights is not finite.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(100, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return 0.5 * (model.weight**2).sum()
        >>> result = sharpness.average_case(model, loss_fn, [None], rho=0.1, samples=200)
        >>> abs(result.value - 0.5 * 100 * 0.1**2) < 4 * result.standard_error
        True
    """
    ball = Ball(rho, norm, adaptive, eta)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    losses: list[float] = []
    rises: list[list[float]] = []
    with measuring(
        model,
        loss_fn,
        batches,
        name="average-case sharpness",
        parameters=parameters,
        mode=mode,
        m=m,
        normalize_logits=normalize_logits,
        cost_per_batch=(2 * samples + 1) * FORWARD,
        progress=progress,
    ) as measured:
        with measured.movable_weights() as movable:
            for number, batch in enumerate(measured.batches):
                movable.undo()
                centre = measured.loss(batch)
                losses.append(measured.checked(centre, number))
                rises.append([])
                for sample in range(samples):
                    pair = []
                    for sign in (1, -1):
                        _shake(movable, ball, sign, (seed, number, sample))
                        pair.append(float(measured.loss(batch) - centre))
                    rises[-1].append(math.fsum(pair) / 2)
        cost = measured.progress.cost
    per_batch = [math.fsum(row) / samples for row in rises]
    value, error = mean_and_error(per_batch, measured.sizes)
    if len(per_batch) == 1:
        _, error = mean_and_error(rises[0])
    return AverageCase(
        measure="average_case",
        value=value,
        standard_error=error,
        cost=cost,
        settings={
            **ball.settings,
            "samples": samples,
            "m": m,
            "normalize_logits": normalize_logits,
            **measured.settings,
            "seed": seed,
        },
        loss=measured.mean(losses),
        per_batch=tuple(per_batch),
        per_sample=tuple(rise for row in rises for rise in row),
    )


def _shake(movable: MovableWeights, ball: Ball, sign: int, key: tuple[int, int, int]) -> None:
    """Move every weight by ``sign * T u``; equal keys give equal ``u``."""
    rounding = RoundingNoise(seed_of("rounding", *key, sign)).source()
    for index, centre in enumerate(movable.origin):
        noise = ball.draw(centre, stream(centre.device, "noise", *key, index)).mul_(sign * ball.rho)
        if (lengths := ball.lengths(centre)) is not None:
            noise.mul_(lengths)
        movable.move(index, noise, rounding)
