"""What the measures of robustness return: how the loss rises with the strength of a change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samopt.sharpness._measuring.results import Result, mean_and_error
from samopt.sharpness._measuring.style import BLUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Robustness", "rises_at"]


@dataclass(frozen=True)
class Robustness(Result):
    """How the loss rises with the strength of a change; ``value`` is the rise at the strongest one, the last level.

    Attributes:
        levels: Strength of each change, the weakest first: bits, scale of the noise, size of the attack, or steps.
        rises: Rise of the mean loss at each level.
        errors: Standard error of each rise over batches, or None with one batch.
        loss: Mean loss of the unchanged model.
        accuracies: Mean accuracy of the unchanged model and at each level, or None where none was asked for.
        per_batch: Rise on each batch at the last level.
    """

    levels: tuple[float, ...]
    rises: tuple[float, ...]
    errors: tuple[float, ...] | None
    loss: float
    accuracies: tuple[float, ...] | None
    per_batch: tuple[float, ...]

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the rise of the loss at each level.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        places = range(len(self.levels))
        axes.errorbar(places, self.rises, yerr=self.errors, fmt="o-", color=color, capsize=3, label=label)
        axes.set_xticks(places, [f"{level:g}" for level in self.levels])
        axes.set_xlabel(self.settings["levels"])
        axes.set_ylabel(f"rise of the loss (from {self.loss:.3g})" if label is None else "rise of the loss")


def rises_at(losses: Sequence[Sequence[float]], before: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
    """Return the fields ``value`` to ``per_batch`` that follow from the losses.

    Args:
        losses: For each level the loss of each batch.
        before: The loss of each batch at the unchanged model.
        sizes: Examples of each batch.
    """
    rows = [[after - loss for after, loss in zip(row, before, strict=True)] for row in losses]
    found = [mean_and_error(row, sizes) for row in rows]
    has_errors = len(before) > 1
    return {
        "value": found[-1][0],
        "standard_error": found[-1][1],
        "rises": tuple(mean for mean, _ in found),
        "errors": tuple(error or 0.0 for _, error in found) if has_errors else None,
        "loss": mean_and_error(before, sizes)[0],
        "per_batch": tuple(rows[-1]),
    }
