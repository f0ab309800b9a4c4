"""The intrinsic dimension of a data set, or of features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samopt.sharpness._measuring.progress import Progress, ProgressOption
from samopt.sharpness._measuring.results import Result, mean_and_error
from samopt.sharpness._measuring.style import BLUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["IntrinsicDimension", "intrinsic_dimension"]

_CHUNK = 128
_METHODS = ("mle", "twonn")
_KEPT = 0.9  # part of the ratios that TwoNN fits its line to, as its authors do


@dataclass(frozen=True)
class IntrinsicDimension(Result):
    """What ``intrinsic_dimension`` returns; ``value`` is the dimension.

    Attributes:
        points: Number of different points.
        per_point: For "mle" the mean log ratio of distances at each point, whose mean is one over the dimension; for
            "twonn" the log of the ratio of the second distance to the first.
    """

    points: int
    per_point: tuple[float, ...]

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the ratios: for "twonn" against the line whose slope is the dimension.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        name = f"{label or 'dimension'}: {self.value:.3g}"
        if self.settings["method"] == "mle":
            axes.hist(self.per_point, bins=50, color=color, alpha=0.4, label=name)
            axes.set_xlabel("mean log ratio of distances to neighbours")
            axes.set_ylabel("number of points")
            return
        ratios = sorted(self.per_point)
        ranks = [-math.log1p(-index / len(ratios)) for index in range(len(ratios))]
        axes.plot(ratios, ranks, ".", markersize=3, color=color)
        axes.plot([0, ratios[-1]], [0, self.value * ratios[-1]], color=color, label=name)
        axes.set_ylim(0, 1.1 * max(ranks))
        axes.set_xlabel("log ratio of the distances to the second and the first neighbour")
        axes.set_ylabel("-log(1 - part of the points below)")


def intrinsic_dimension(
    points: Tensor, *, method: str = "mle", neighbours: int = 20, progress: ProgressOption = None
) -> IntrinsicDimension:
    """Return how many dimensions a cloud of points has locally, from the distances between neighbours.

    With ``T_j`` the distance to the j-th neighbour and ``k = neighbours``::

        mle:    1 / d = mean over points of  1 / (k - 1) * sum over j < k of log(T_k / T_j)
        twonn:  the slope through 0 of -log(1 - F) over log(T_2 / T_1), F the ratio's empirical distribution

    Sources: Levina & Bickel 2004, averaged as MacKay & Ghahramani 2005 correct it and Pope et al. 2021 use it; Facco et
    al. 2017, whose line leaves out the largest tenth of the ratios. Points that occur twice count once. Konz &
    Mazurowski 2024 relate it to generalisation, beside the label sharpness.

    Misleads: it is biased low above ten dimensions, the more so the fewer points; compare data sets of one size.

    Cost: no gradient; ``n^2`` distances.

    Args:
        points: Shape ``(n, ...)``: inputs, or features that a layer makes of them.
        method: "mle" or "twonn".
        neighbours: For "mle": k, >= 2; more neighbours, less noise and more bias.
        progress: See ``ProgressOption``.

    Returns:
        The dimension, with its standard error as if the points' ratios were independent.

    Raises:
        ValueError: If an argument is out of range, or there are too few different points.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> plane = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) @ torch.ones(2, 50).tril()
        >>> round(sharpness.intrinsic_dimension(plane, method="twonn").value)  # in 50 coordinates
        2
    """
    if method not in _METHODS:
        raise ValueError(f'method must be "mle" or "twonn", got {method!r}')
    if neighbours < 2:
        raise ValueError(f"neighbours must be at least 2, got {neighbours}")
    count = neighbours if method == "mle" else 2
    flat = points.detach().cpu() if points.device.type == "mps" else points.detach()  # which has no fp64
    if not flat.isfinite().all():
        raise ValueError("intrinsic_dimension needs finite points, got some that are NaN or infinite; leave them out")
    cloud = torch.unique(flat.reshape(len(flat), -1).double(), dim=0)
    if len(cloud) <= count:
        raise ValueError(
            f"intrinsic_dimension needs more than {count} different points for {count} neighbours, got {len(cloud)}"
        )
    cloud -= cloud.mean(dim=0)  # far from 0 the distances would lose digits
    ratios = _log_ratios(cloud, count, progress)
    mean, error = mean_and_error(ratios)
    if method == "mle":
        value = 1 / mean
        deviation = None if error is None else value**2 * error  # to first order
    else:
        value = _slope(sorted(ratios))
        deviation = value / math.sqrt(len(ratios))
    return IntrinsicDimension(
        measure="intrinsic_dimension",
        value=value,
        standard_error=deviation,
        cost=0.0,
        settings={"method": method, "neighbours": count, "examples": len(points)},
        points=len(cloud),
        per_point=tuple(ratios),
    )


def _log_ratios(cloud: Tensor, count: int, progress: ProgressOption) -> list[float]:
    """Return the mean of ``log(T_count / T_j)`` over the nearer neighbours of each point."""
    counter = Progress(progress, "intrinsic dimension", float(len(cloud)))
    squares = cloud.square().sum(dim=1)
    found: list[float] = []
    try:
        for start in range(0, len(cloud), _CHUNK):
            rows = cloud[start : start + _CHUNK]
            rough = squares[start : start + _CHUNK, None] + squares - 2 * rows @ cloud.T
            rough[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = math.inf  # itself
            nearest = rough.topk(count, dim=1, largest=False).indices
            # The formula above loses digits for close neighbours; this one does not.
            distances = torch.linalg.vector_norm(rows[:, None] - cloud[nearest], dim=2).sort(dim=1).values
            logs = distances.log()
            found += (logs[:, -1:] - logs[:, :-1]).mean(dim=1).tolist()
            counter.advance(len(rows))
    finally:
        counter.close()
    return found


def _slope(ratios: list[float]) -> float:
    """Return the least-squares slope through 0 of the ratios' distribution."""
    kept = range(int(_KEPT * len(ratios)))
    heights = [-math.log1p(-index / len(ratios)) for index in kept]
    return math.fsum(ratios[i] * heights[i] for i in kept) / math.fsum(ratios[i] ** 2 for i in kept)
