"""Worst-case sharpness: how much the loss can rise within a ball around the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, GRADIENT, measuring
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result, mean_and_error
from samopt.sharpness._measuring.style import BLUE
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.nearby.auto_pgd import AutoPGD
from samopt.sharpness.nearby.ball import AdaptiveOption, Ball

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["WorstCase", "worst_case"]


@dataclass(frozen=True)
class WorstCase(Result):
    """What ``worst_case`` returns; ``value`` is the mean over batches, its error that of the mean.

    Attributes:
        loss: Mean loss at the weights themselves.
        per_batch: Rise found on each batch, >= 0.
        curve: Mean over batches of the largest rise found within 1, 2, ... steps; the first is SAM's own ascent.
    """

    loss: float
    per_batch: tuple[float, ...]
    curve: tuple[float, ...]

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw how the rise grew with the number of ascent steps.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        axes.plot(range(1, len(self.curve) + 1), self.curve, marker=".", color=color, label=label)
        axes.set_xlabel("ascent steps")
        axes.set_ylabel(f"largest rise of the loss found\n({self.settings['norm']} ball, rho {self.settings['rho']:g})")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)


def worst_case(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    norm: str = "l2",
    adaptive: AdaptiveOption = False,
    eta: float = 0.0,
    steps: int = 20,
    restarts: int = 1,
    m: int | None = None,
    normalize_logits: bool = False,
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    progress: ProgressOption = None,
) -> WorstCase:
    """Return the mean of ``max over ||T^-1 d||_p <= rho of L(w + d) - L(w)``.

    The maximum is searched for with auto-PGD, so the value is a lower bound, which grows with ``steps`` and
    ``restarts``. It is never below 0, nor below the rise after SAM's single step, which ``steps=1`` returns exactly.
    Source: Foret et al. 2021, equation 1; Andriushchenko et al. 2023, section 3, whose ``T = |w|`` holds for every
    tensor.

    The mean weighs each batch by its examples. Where the gradient is exactly 0 (a training loss of 0 in fp32), nothing
    points uphill: the search goes on from a random point of the ball, but for ``steps=1``.

    ``T`` is 1, or ``|w| + eta`` with the adaptive geometry of Kwon et al. 2021. The search is auto-PGD (Croce &
    Hein 2020).

    Misleads: at one radius only, since models change places as ``rho`` grows, and a large ``rho`` leaves the region
    that training knows. Without ``adaptive`` the value follows the scale of the weights, which is arbitrary before
    a normalisation layer: halving a weight whose output BatchNorm or LayerNorm rescales leaves the function alone
    and makes the same move twice as large. With ``adaptive`` weights near 0 cannot move, so a sparse network looks
    flat.

    Cost: ``restarts * (steps + 1/3)`` gradients a batch. Memory: three copies of the weights that move.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches, each with a maximum of its own.
        rho: Radius, >= 0, in the units of the norm.
        norm: "l2" or "linf".
        adaptive: False for ``T = 1``; True for ``T = |w| + eta`` everywhere; "asam" for 1 on tensors of dim <= 1 and
            ``|w| + eta`` on the others, as the optimizer ``ASAM`` has it.
        eta: >= 0. The paper's measure has 0, ``ASAM`` has 0.01.
        steps: Ascent steps, >= 1.
        restarts: Searches, >= 1; the first starts at the weights, the others at random points of the ball.
        m: Examples over which one perturbation is shared (m-sharpness); None takes the batches as they are.
        normalize_logits: Normalise the model's logits (see ``normalize_logits``), so that scaling them changes nothing.
        parameters: Names or patterns of the parameters that move; None for every trainable one.
        mode: "eval", "train", or "keep".
        seed: Decides the random starts, and the rounding of bf16 and fp16 weights.
        progress: See ``ProgressOption``.

    Returns:
        The sharpness, its convergence and its cost.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the loss at the weights is not finite.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 4.0]])
        >>> def loss_fn(model, batch):
        ...     return model(batch).mean()
        >>> result = sharpness.worst_case(model, loss_fn, [torch.tensor([[0.6, 0.8]])], rho=0.5)
        >>> round(result.value, 6)  # the gradient is (0.6, 0.8), of length 1
        0.5
    """
    ball = Ball(rho, norm, adaptive, eta)
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    searches = []
    nan_batches = []
    with measuring(
        model,
        loss_fn,
        batches,
        name="worst-case sharpness",
        parameters=parameters,
        mode=mode,
        m=m,
        normalize_logits=normalize_logits,
        cost_per_batch=restarts * (steps * GRADIENT + FORWARD),
        progress=progress,
    ) as measured:
        with measured.movable_weights() as movable:
            for number, batch in enumerate(measured.batches):
                search = AutoPGD(measured, batch, ball, movable, (seed, number))
                curve = search.run(steps, restarts)
                searches.append((measured.checked(search.loss, number), curve))
                if search.met_nan:
                    nan_batches.append(number)
        cost = measured.progress.cost
    if nan_batches:
        warnings.warn(
            f"the loss was NaN at points within rho={rho:g} on batches {nan_batches}, where the search ended; the "
            "value is a bound from the points before, so measure at a smaller radius",
            stacklevel=2,
        )
    per_batch = tuple(curve[-1] for _, curve in searches)
    value, error = mean_and_error(per_batch, measured.sizes)
    return WorstCase(
        measure="worst_case",
        value=value,
        standard_error=error,
        cost=cost,
        settings={
            **ball.settings,
            "steps": steps,
            "restarts": restarts,
            "m": m,
            "normalize_logits": normalize_logits,
            **measured.settings,
            "seed": seed,
        },
        loss=measured.mean([loss for loss, _ in searches]),
        per_batch=per_batch,
        curve=tuple(measured.mean(column) for column in zip(*(curve for _, curve in searches), strict=True)),
    )
