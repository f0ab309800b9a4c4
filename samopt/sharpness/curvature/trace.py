"""The trace of the loss's curvature, from random probes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import measuring
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result, mean_and_error
from samopt.sharpness._measuring.seeds import stream
from samopt.sharpness._measuring.style import BLUE
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.curvature.operators import curvature, product_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Trace", "hessian_trace"]


@dataclass(frozen=True)
class Trace(Result):
    """What ``hessian_trace`` returns; its error is that of the mean over probes.

    Attributes:
        samples: Each probe's estimate.
        per_batch: Estimate of each batch's own trace, from the same probes.
        size: Number of rows of the matrix: ``value / size`` is the mean eigenvalue.
    """

    samples: tuple[float, ...]
    per_batch: tuple[float, ...]
    size: int

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw how the estimate settled.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        counts = range(min(2, len(self.samples)), len(self.samples) + 1)
        running = [mean_and_error(self.samples[:count]) for count in counts]
        errors = [error or 0.0 for _, error in running]
        axes.errorbar(counts, [mean for mean, _ in running], yerr=errors, fmt=".-", color=color, label=label)
        axes.set_xlabel("number of probes")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel("trace: mean over probes ± standard error")


def hessian_trace(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    samples: int = 30,
    matrix: str = "hessian",
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    progress: ProgressOption = None,
) -> Trace:
    """Return an unbiased estimate of the trace of the Hessian of the mean loss: the mean of ``z . H z``.

    The entries of ``z`` are +1 or -1 (Hutchinson 1990), so the error comes from the matrix's off-diagonal entries
    alone.

    ``value / size`` is the mean eigenvalue.

    Misleads: negative eigenvalues cancel positive ones; look at the ``spectral_density``, too.

    Cost: about 3.5 gradients a batch and probe. Memory: three copies of the weights.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: As for ``hessian_eigenvalues``.
        samples: Probes, >= 1.
        matrix: "hessian", or "gauss_newton" for its Gauss-Newton part.
        parameters: As for ``hessian_eigenvalues``.
        mode: "eval", "train", or "keep".
        seed: Decides the probes.
        progress: See ``ProgressOption``.

    Returns:
        The trace, with its standard error.

    Raises:
        RuntimeError: If an operation has no second derivative.
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (torch.tensor([1.0, 2.0, 3.0]) * model.weight**2).sum() / 2
        >>> round(sharpness.hessian_trace(model, loss_fn, [None], samples=2).value, 4)  # exact for a diagonal matrix
        6.0
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    with measuring(
        model,
        loss_fn,
        batches,
        name="trace",
        parameters=parameters,
        mode=mode,
        cost_per_batch=samples * product_cost(matrix),
        progress=progress,
    ) as measured:
        product = curvature(measured, matrix)
        quotients: list[list[float]] = []
        for sample in range(samples):
            generator = stream(product.device, "probe", seed, sample)
            probe = torch.randint(2, (product.size,), generator=generator, device=product.device, dtype=torch.int8)
            signs = probe.to(product.dtype).mul_(2).sub_(1)
            del probe
            quotients.append(product.quotients(signs))
        cost = measured.progress.cost
        estimates = [measured.mean(row) for row in quotients]
    value, error = mean_and_error(estimates)
    return Trace(
        measure="hessian_trace",
        value=value,
        standard_error=error,
        cost=cost,
        settings={"matrix": matrix, "samples": samples, **measured.settings, "seed": seed},
        samples=tuple(estimates),
        per_batch=tuple(math.fsum(column) / samples for column in zip(*quotients, strict=True)),
        size=product.size,
    )
