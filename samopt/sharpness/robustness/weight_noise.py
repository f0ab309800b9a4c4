"""The loss under random noise on the weights, at several strengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from samopt.sharpness._measuring.batches import read_batches
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.progress import ProgressOption, part_of
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.nearby.average_case import AverageCase, average_case
from samopt.sharpness.nearby.ball import AdaptiveOption
from samopt.sharpness.robustness.result import Robustness

__all__ = ["weight_noise"]


def weight_noise(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    scales: Sequence[float] = (0.02, 0.05, 0.1),
    adaptive: AdaptiveOption = True,
    samples: int = 5,
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    progress: ProgressOption = None,
) -> Robustness:
    """Return the rise of the loss when every weight is multiplied by ``1 + u``, ``u ~ N(0, scale^2)``.

    It is ``average_case`` at several radii: analog hardware, or weights that were stored badly.

    Misleads: as ``average_case`` does.

    Cost: ``len(scales) * (2 * samples + 1) / 3`` gradients a batch. Memory: one copy of the weights that move.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches; means weigh examples.
        scales: Strengths of the noise, each >= 0; the last one decides ``value``.
        adaptive: As for ``average_case``; False for noise of one size on all weights.
        samples: Draws of the noise for each batch, >= 1.
        parameters: Names or patterns of the parameters that move; None for every trainable one.
        mode: "eval", "train", or "keep".
        seed: Decides the noise.
        progress: See ``ProgressOption``.

    Returns:
        The rise at each scale.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the loss at the weights is not finite.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(100, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (model.weight**2).sum()
        >>> result = sharpness.weight_noise(model, loss_fn, [None], scales=[0.1, 0.2], samples=50)
        >>> 3.5 < result.rises[1] / result.rises[0] < 4.5  # to second order the rise grows with the scale squared
        True
    """
    if not scales:
        raise ValueError("scales is empty; give at least one strength of the noise, as in scales=[0.05]")
    kept = read_batches(batches)
    results: list[AverageCase] = []
    for number, scale in enumerate(scales):
        results.append(
            average_case(
                model,
                loss_fn,
                kept,
                rho=scale,
                adaptive=adaptive,
                samples=samples,
                parameters=parameters,
                mode=mode,
                seed=seed,
                progress=part_of(progress, sum(result.cost for result in results), number, len(scales)),
            )
        )
    last = results[-1]
    own = ("model", "examples", "mode")
    return Robustness(
        measure="weight_noise",
        value=last.value,
        standard_error=last.standard_error,
        cost=sum(result.cost for result in results),
        settings={
            "levels": "standard deviation of the noise, as a part of each weight" if adaptive else "scale of the noise",
            "samples": samples,
            "adaptive": adaptive,
            "seed": seed,
            **{name: last.settings[name] for name in own},
        },
        levels=tuple(float(scale) for scale in scales),
        rises=tuple(result.value for result in results),
        errors=None if last.standard_error is None else tuple(result.standard_error or 0.0 for result in results),
        loss=last.loss,
        accuracies=None,
        per_batch=last.per_batch,
    )
