"""How sharply a data set's labels change with its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samopt.sharpness._measuring.progress import Progress, ProgressOption
from samopt.sharpness._measuring.results import Result
from samopt.sharpness._measuring.style import BLUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LabelSharpness", "label_sharpness"]

_CHUNK = 512


@dataclass(frozen=True)
class LabelSharpness(Result):
    """What ``label_sharpness`` returns; ``value`` is K_F.

    Attributes:
        pair: Positions of the two examples that attain it, or None where all labels are equal.
        per_example: Largest ratio of each example with any other, 0 where no other label differs.
    """

    pair: tuple[int, int] | None
    per_example: tuple[float, ...]

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the distribution over examples.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        finite = [value for value in self.per_example if value < float("inf")]
        axes.hist(finite, bins=50, color=color, label=label)
        axes.set_xlabel("largest change of the label per unit of distance")
        axes.set_ylabel(f"examples ({len(self.per_example) - len(finite)} more with a twin of another label)")


def label_sharpness(
    inputs: Tensor, labels: Tensor, *, classes: bool | None = None, progress: ProgressOption = None
) -> LabelSharpness:
    """Return ``K_F = max over pairs of |y_i - y_j| / ||x_i - x_j||_2``, the labels' Lipschitz constant on the data.

    Labels of classes differ by 1 or not at all, so ``K_F`` is one over the smallest distance between examples of
    different classes; equal inputs with different labels make it infinite. It grows with the number of examples, so
    compare data sets of one size. Source: Konz & Mazurowski 2024, "The Effect of Intrinsic Dataset Properties on
    Generalization", equation 2.

    Pairs of equal labels do not count (in the published code they do).

    Misleads: one wrong label or one duplicate decides it.

    Cost: no gradient; ``n^2`` distances.

    Args:
        inputs: Shape ``(n, ...)``, n >= 2.
        labels: Shape ``(n,)``, or ``(n, ...)`` for regression (then ``|y_i - y_j|`` is an l2 norm).
        classes: Whether labels are classes; None for yes where they are integers.
        progress: See ``ProgressOption``.

    Returns:
        The label sharpness, the pair that attains it, and its distribution over examples.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> result = sharpness.label_sharpness(torch.tensor([[0.0], [0.1], [2.0]]), torch.tensor([3, 3, 7]))
        >>> round(result.value, 4), result.pair  # the pair at distance 0.1 has equal labels, and does not count
        (0.5263, (1, 2))
    """
    count = len(inputs)
    if count < 2 or len(labels) != count:
        raise ValueError(f"label_sharpness needs n >= 2 inputs and n labels, got {count} and {len(labels)}")
    if classes is None:
        classes = not labels.is_floating_point()
    inputs = inputs.detach().cpu() if inputs.device.type == "mps" else inputs.detach()  # which has no fp64
    points = inputs.reshape(count, -1).double()
    targets = labels.detach().to(points.device).reshape(count, -1)
    for name, values in (("inputs", points), ("labels", targets)):
        if not values.isfinite().all():
            raise ValueError(f"label_sharpness needs finite {name}, got some that are NaN or infinite; leave them out")
    centred = points - points.mean(dim=0)  # far from 0 the distances would lose digits
    squares = centred.square().sum(dim=1)
    best: list[tuple[float, int]] = []
    counter = Progress(progress, "label sharpness", float(count))
    try:
        for start in range(0, count, _CHUNK):
            rows = slice(start, min(start + _CHUNK, count))
            gap = _gap(targets[rows], targets, classes)
            distance = (squares[rows, None] + squares - 2 * centred[rows] @ centred.T).clamp_min_(0).sqrt_()
            ratio = torch.where(gap > 0, gap / distance, 0.0)
            for row, other in enumerate(ratio.argmax(dim=1).tolist(), start=start):
                # The formula above loses digits for near twins; this one does not.
                apart = float(torch.linalg.vector_norm(points[row] - points[other]))
                change = float(gap[row - start, other])
                best.append((0.0 if change == 0 else change / apart if apart > 0 else float("inf"), other))
            counter.advance(rows.stop - rows.start)
    finally:
        counter.close()
    per_example = tuple(ratio for ratio, _ in best)
    first = max(range(count), key=per_example.__getitem__)
    value = per_example[first]
    return LabelSharpness(
        measure="label_sharpness",
        value=value,
        standard_error=None,
        cost=0.0,
        settings={"examples": count, "classes": classes},
        pair=(min(first, best[first][1]), max(first, best[first][1])) if value > 0 else None,
        per_example=per_example,
    )


def _gap(some: Tensor, all_targets: Tensor, classes: bool) -> Tensor:
    if classes:
        return (some[:, None, :] != all_targets[None, :, :]).any(dim=2).double()
    exact = "donot_use_mm_for_euclid_dist"  # the other way loses digits for labels far from 0
    return torch.cdist(some.double(), all_targets.double(), compute_mode=exact)
