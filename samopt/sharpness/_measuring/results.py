"""What a measure returns: a value with its error and its cost, to keep, to log or to plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from samopt.sharpness._measuring.style import BLUE, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Result", "largest", "mean_and_error", "plain", "to_json"]


@dataclass(frozen=True)
class Result:
    """A measurement.

    Attributes:
        measure: Name of the measure.
        value: The one number to compare models by.
        standard_error: Its standard error, or None where it has none or too little was sampled to tell.
        cost: What it cost, in gradients of one batch (a forward pass alone counts 1/3).
        settings: The arguments that decide what the value means.
    """

    measure: str
    value: float
    standard_error: float | None
    cost: float
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dicts, ready for JSON."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @property
    def title(self) -> str:
        """The measure's name in words, and the model's."""
        words = self.measure.replace("_", " ")
        model = self.settings.get("model")
        return words if model is None else f"{words}: {model}"

    def plot(self, title: str | None = None) -> Figure:
        """Return a matplotlib figure.

        Args:
            title: Of the figure; None for the measure's name and the model's.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        figure, axes = new_figure()
        self.draw(axes)
        finish(axes, self.title if title is None else title)
        return figure

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw into given axes; several results of one measure may be drawn into the same ones.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        name = self.measure.replace("_", " ")
        axes.errorbar([label or name], [self.value], yerr=self.standard_error, fmt="o", color=color, capsize=4)
        axes.set_ylabel(name)
        axes.margins(x=0.3)


def mean_and_error(values: Sequence[float], sizes: Sequence[float] | None = None) -> tuple[float, float | None]:
    """Return the mean and its standard error; None for fewer than two values.

    With sizes ``n_i``, shares ``p_i = n_i / sum n`` and k values, the mean is ``m = sum p_i x_i`` and its squared error
    ``k / (k - 1) * sum p_i^2 (x_i - m)^2``; with equal sizes that is the usual formula.

    Args:
        values: At least one independent value.
        sizes: How much each counts, as the number of examples that it is the mean of; None for the same.
    """
    count = len(values)
    if sizes is None:
        sizes = [1.0] * count
    total = math.fsum(sizes)
    mean = math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / total
    if count < 2:
        return mean, None
    parts = ((value - mean) * size / total for value, size in zip(values, sizes, strict=True))
    return mean, math.hypot(*parts) * math.sqrt(count / (count - 1))  # the squares themselves may overflow


def largest(values: Iterable[float]) -> float:
    """Return the largest number, or NaN where one is NaN: ``max`` would depend on their order.

    Args:
        values: At least one number.
    """
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def plain(value: Any) -> Any:
    """Return a value as numbers, strings, lists and dicts.

    Args:
        value: A result, a tensor, a number, a string, or a container of them.
    """
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, str | int | float) or value is None else str(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as strict JSON; numbers that are not finite, which JSON lacks, become null.

    Args:
        value: As for ``plain``.
        indent: As for ``json.dumps``.
    """
    return json.dumps(_without_nan(plain(value)), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list) else value
