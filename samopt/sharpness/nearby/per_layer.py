"""Any measure, one layer at a time: which part of a network is sharp."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from samopt.sharpness._measuring.batches import read_batches
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.progress import ProgressOption, part_of
from samopt.sharpness._measuring.results import Result
from samopt.sharpness._measuring.style import BLUE
from samopt.sharpness._measuring.weights import select, trainable_layers, unwrap
from samopt.sharpness.nearby.worst_case import worst_case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PerLayer", "per_layer"]


@dataclass(frozen=True)
class PerLayer(Result):
    """What ``per_layer`` returns; ``value`` is the largest among the layers.

    Attributes:
        layers: The measure's own result for each layer, in the model's order.
    """

    layers: dict[str, Result]

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw one point a layer.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        names = list(self.layers)
        values = [result.value for result in self.layers.values()]
        errors = [result.standard_error or 0.0 for result in self.layers.values()]
        axes.errorbar(values, names, xerr=errors, fmt="o", color=color, capsize=3, label=label)
        if not axes.yaxis_inverted():
            axes.invert_yaxis()
        axes.set_ylabel("layer")
        axes.set_xlabel(next(iter(self.layers.values())).measure.replace("_", " "))


def per_layer(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    measure: Callable[..., Result] = worst_case,
    layers: Iterable[str] | None = None,
    progress: ProgressOption = None,
    **options: Any,
) -> PerLayer:
    """Return a measure restricted to one layer's weights at a time, the others staying where they are.

    The value of layer l is ``S(w_l)`` with all other weights fixed.

    Misleads: at one common l2 radius a layer with few weights is moved relatively further; use ``adaptive=True`` to
    compare layers of different sizes. All layers together can rise more than the sum of the single rises, or less.

    Cost: that of the measure, times the number of layers.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches; read once.
        measure: Any measure of this package that takes ``parameters``.
        layers: Module names, parameter names or patterns, one for each "layer"; None for every module that holds
            trainable parameters itself, and each parameter that the model itself holds.
        progress: See ``ProgressOption``.
        **options: The measure's own arguments.

    Returns:
        A result for each layer.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a layer does not exist, or an option is out of range.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> batch = (torch.randn(16, 4), torch.randint(3, (16,)))
        >>> list(sharpness.per_layer(model, sharpness.cross_entropy, [batch], rho=0.1, steps=1).layers)
        ['0', '2']
    """
    inner = unwrap(model)
    names = trainable_layers(inner) if layers is None else list(layers)
    for name in names:
        select(inner, name)  # before the first layer is measured at length
    kept = read_batches(batches)
    results: dict[str, Result] = {}
    for name in names:
        overall = part_of(progress, sum(result.cost for result in results.values()), len(results), len(names))
        results[name] = measure(model, loss_fn, kept, parameters=name, progress=overall, **options)
    largest = max(results.values(), key=lambda result: result.value)
    return PerLayer(
        measure="per_layer",
        value=largest.value,
        standard_error=largest.standard_error,
        cost=sum(result.cost for result in results.values()),
        settings={"measure": largest.measure, **largest.settings},
        layers=results,
    )
