"""How the eigenvalues of the loss's curvature are distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import measuring
from samopt.sharpness._measuring.optional_packages import require
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result
from samopt.sharpness._measuring.seeds import stream
from samopt.sharpness._measuring.style import BLUE
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.curvature.operators import Curvature, curvature, dot, product_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SpectralDensity", "spectral_density", "tridiagonalize"]

_POINTS = 512
_BREAKDOWN = 1e-6  # a remainder this small beside the matrix is rounding: the vectors span an invariant subspace


@dataclass(frozen=True)
class SpectralDensity(Result):
    """What ``spectral_density`` returns; ``value`` is the largest eigenvalue found, a lower bound of the largest.

    Attributes:
        nodes: Places of the quadrature, over all probes.
        weights: Their weights, which add up to 1. ``sum(weight * f(node))`` estimates ``tr f(H) / size``, exactly (for
            the probes drawn) where f is a polynomial of degree below ``2 * steps``.
        width: Standard deviation of the normal curve that each node is drawn as.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    width: float

    def density(self, at: float) -> float:
        """Return the smoothed density.

        Args:
            at: Where on the axis of eigenvalues.
        """
        scale = self.width * math.sqrt(2 * math.pi)
        return sum(
            weight * math.exp(-0.5 * ((at - node) / self.width) ** 2) / scale
            for node, weight in zip(self.nodes, self.weights, strict=True)
        )

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the smoothed density on a logarithmic scale.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        low, high = min(self.nodes) - 4 * self.width, max(self.nodes) + 4 * self.width
        grid = [low + (high - low) * point / (_POINTS - 1) for point in range(_POINTS)]
        densities = [self.density(at) for at in grid]
        axes.semilogy(grid, densities, color=color, label=label)
        axes.set_ylim(bottom=max(densities) * 1e-8)
        axes.set_xlabel("eigenvalue (loss per squared unit of weight)")
        axes.set_ylabel(f"density (nodes widened by {self.width:.2g})")


def spectral_density(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    steps: int = 40,
    samples: int = 5,
    width: float | None = None,
    reorthogonalize: bool = True,
    matrix: str = "hessian",
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    progress: ProgressOption = None,
) -> SpectralDensity:
    """Return the density of the Hessian's eigenvalues by stochastic Lanczos quadrature.

    Source: Ghorbani et al. 2019, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density".

    The density is ``1/n sum of delta(t - lambda_i)``: the bulk near 0, the few outliers, the negative part.

    Misleads: nodes are widened to be seen (``width``); structure finer than that, or than ``range / steps``, is not
    resolved.

    Cost: about ``3.5 * steps * samples`` gradients a batch. Memory: ``steps`` copies of the weights, or five without
    reorthogonalisation, where eigenvalues that have converged show up more than once with their weight split.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: As for ``hessian_eigenvalues``.
        steps: Lanczos steps a probe, >= 1: the resolution.
        samples: Probes, >= 1: the noise.
        width: Standard deviation of the smoothing, in eigenvalues; None for 1% of the range found.
        reorthogonalize: Keep every Lanczos vector, and the vectors orthogonal.
        matrix: "hessian", or "gauss_newton" for its Gauss-Newton part.
        parameters: As for ``hessian_eigenvalues``.
        mode: "eval", "train", or "keep".
        seed: Decides the probes.
        progress: See ``ProgressOption``.

    Returns:
        The density, as nodes and weights.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
        RuntimeError: If an operation has no second derivative.
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (torch.tensor([1.0, 3.0]) * model.weight**2).sum() / 2
        >>> result = sharpness.spectral_density(model, loss_fn, [None], steps=2, samples=1)
        >>> [round(node, 4) for node in result.nodes]
        [1.0, 3.0]
    """
    for name, count in (("steps", steps), ("samples", samples)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if width is not None and not width > 0:
        raise ValueError(f"width must be > 0, got {width}; leave it out for 1% of the range of the eigenvalues")
    solve = require("scipy.linalg", "a spectral density").eigh_tridiagonal
    nodes: list[float] = []
    weights: list[float] = []
    with measuring(
        model,
        loss_fn,
        batches,
        name="spectral density",
        parameters=parameters,
        mode=mode,
        cost_per_batch=samples * steps * product_cost(matrix),
        progress=progress,
    ) as measured:
        product = curvature(measured, matrix)
        for sample in range(samples):
            diagonal, beside = tridiagonalize(product, _probe(product, seed, sample), steps, reorthogonalize)
            values, vectors = solve(diagonal, beside)
            nodes += values.tolist()
            weights += (vectors[0] ** 2 / samples).tolist()
        cost = measured.progress.cost
    if width is None:
        width = 0.01 * (max(nodes) - min(nodes)) or 0.01 * max(abs(nodes[0]), 1e-12)
    return SpectralDensity(
        measure="spectral_density",
        value=max(nodes),
        standard_error=None,
        cost=cost,
        settings={"matrix": matrix, "steps": steps, "samples": samples, **measured.settings, "seed": seed},
        nodes=tuple(nodes),
        weights=tuple(weights),
        width=width,
    )


def tridiagonalize(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int, reorthogonalize: bool
) -> tuple[list[float], list[float]]:
    """Return the diagonal and the off-diagonal of the Lanczos matrix ``Q^T A Q``.

    Args:
        product: From ``v`` to ``A v``, with A symmetric.
        start: Its direction is the first column of Q; shape ``(size,)``; overwritten.
        steps: Columns of Q; fewer come out where they span an invariant subspace already.
        reorthogonalize: Keep every column, and make each new one orthogonal to all of them, twice.
    """
    diagonal: list[float] = []
    beside: list[float] = []
    current = start.div_(torch.linalg.vector_norm(start))
    previous = current
    kept: list[Tensor] = []
    largest = 0.0
    steps = min(steps, start.numel())
    del start
    for step in range(steps):
        if reorthogonalize:
            kept.append(current)
        following = product(current)
        diagonal.append(dot(following, current))
        following.sub_(current, alpha=diagonal[-1])
        if step > 0:
            following.sub_(previous, alpha=beside[-1])
        for column in (*kept, *kept):
            following.sub_(column, alpha=dot(following, column))
        length = float(torch.linalg.vector_norm(following))
        largest = max(largest, abs(diagonal[-1]), length)
        if length <= _BREAKDOWN * largest or step + 1 == steps:
            break
        beside.append(length)
        previous, current = current, following.div_(length)
    return diagonal, beside


def _probe(product: Curvature, seed: int, sample: int) -> Tensor:
    generator = stream(product.device, "spectrum", seed, sample)
    return torch.randn(product.size, generator=generator, device=product.device, dtype=product.dtype)
