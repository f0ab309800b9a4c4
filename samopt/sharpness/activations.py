"""Which units of a network are at work."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, MeasuredModel, measuring
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result, mean_and_error
from samopt.sharpness._measuring.style import BLUE
from samopt.sharpness._measuring.weights import unwrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ActiveUnits", "active_units"]

_CUTTING = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.Hardswish)  # activations with exact zeros


@dataclass(frozen=True)
class ActiveUnits(Result):
    """What ``active_units`` returns; ``value`` is the fraction active among all units of all layers.

    Attributes:
        layers: For each layer the fraction of its outputs that are active, averaged over examples and positions.
        dead: For each layer the fraction of its units that were never active.
    """

    layers: dict[str, float]
    dead: dict[str, float]

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the active and the dead fraction of each layer.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        active = "active" if label is None else f"{label}: active"
        axes.plot(list(self.layers.values()), list(self.layers), "o", color=color, label=active)
        axes.plot(list(self.dead.values()), list(self.dead), "x", color=color, label="units that were never active")
        if not axes.yaxis_inverted():
            axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("fraction")
        axes.set_ylabel("layer")


def active_units(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    layers: str | Iterable[str] | None = None,
    threshold: float = 0.0,
    mode: str = "eval",
    progress: ProgressOption = None,
) -> ActiveUnits:
    """Return the fraction of activations whose magnitude is above a threshold, layer by layer.

    SAM lowers it: Andriushchenko et al. 2023, "Sharpness-Aware Minimization Leads to Low-Rank Features". A unit is a
    channel: the second dimension of outputs with four or five, otherwise the last.

    The value is the share of pairs of example and unit with ``|activation| > threshold``.

    Misleads: it is no sharpness. Activations without exact zeros (GELU) need a ``threshold``.

    Cost: 1/3 gradient a batch.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``; its value is not used.
        batches: Batches.
        layers: Name or names of the modules to look at, after whose activation a unit counts; None for every module
            that is an activation with exact zeros (ReLU and its like). A function such as ``torch.relu`` is no module.
        threshold: What counts as inactive, >= 0; 0 for exact zeros.
        mode: "eval", "train", or "keep".
        progress: See ``ProgressOption``.

    Returns:
        The fractions, with the standard error of the mean over batches.

    Raises:
        TypeError: If a layer returns no tensor.
        ValueError: If there is no such layer, or it is never called.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())
        >>> model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
        >>> batch = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, 2.0, -1.0, -1.0]])
        >>> result = sharpness.active_units(model, lambda model, batch: model(batch).sum(), [batch])
        >>> result.value, result.dead
        (0.375, {'1': 0.5})
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}; 0 counts exact zeros")
    modules = _choose(unwrap(model), layers)
    counters = {name: _Counter(name, threshold) for name in modules}
    fractions = []
    with measuring(
        model, loss_fn, batches, name="active units", mode=mode, cost_per_batch=FORWARD, progress=progress
    ) as measured:
        with ExitStack() as hooks:
            for name, module in modules.items():
                hooks.callback(module.register_forward_hook(counters[name]).remove)
            for batch in measured.batches:
                fractions.append(_fraction_of(measured, batch, counters))
        cost = measured.progress.cost
    silent = [name for name, counter in counters.items() if counter.seen == 0]
    if silent:
        raise ValueError(f"layers {silent} were never called by loss_fn; leave them out")
    total = sum(counter.seen for counter in counters.values())
    return ActiveUnits(
        measure="active_units",
        value=sum(counter.active for counter in counters.values()) / total,
        standard_error=mean_and_error(fractions)[1],
        cost=cost,
        settings={"threshold": threshold, **measured.settings},
        layers={name: counter.active / counter.seen for name, counter in counters.items()},
        dead={name: counter.dead for name, counter in counters.items()},
    )


class _Counter:
    """A forward hook that counts one layer's active outputs."""

    def __init__(self, name: str, threshold: float) -> None:
        self.active = 0
        self.seen = 0
        self._name = name
        self._threshold = threshold
        self._ever: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {self._name!r} returned {type(output).__name__}, not a tensor; name one whose output is"
            )
        active = output.detach().abs() > self._threshold
        self.active += int(active.count_nonzero())
        self.seen += active.numel()
        units = active.movedim(1 if active.dim() in (4, 5) else -1, 0).flatten(1).any(dim=1)
        self._ever = units if self._ever is None else self._ever | units

    @property
    def dead(self) -> float:
        """Fraction of units that were never active."""
        return 0.0 if self._ever is None else 1 - float(self._ever.float().mean())


def _fraction_of(measured: MeasuredModel, batch: Any, counters: dict[str, _Counter]) -> float:
    """Run one batch, and return the fraction active in it."""
    before = [(counter.active, counter.seen) for counter in counters.values()]
    measured.loss(batch)
    active = sum(counter.active - b for counter, (b, _) in zip(counters.values(), before, strict=True))
    seen = sum(counter.seen - b for counter, (_, b) in zip(counters.values(), before, strict=True))
    return active / seen if seen else 0.0


def _choose(model: nn.Module, layers: str | Iterable[str] | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if layers is None:
        chosen: dict[str, nn.Module] = {
            name: module for name, module in modules.items() if isinstance(module, _CUTTING)
        }
        if not chosen:
            raise ValueError(
                f"{type(model).__name__} has no module that is a ReLU or the like; name the modules whose outputs to "
                "count with layers="
            )
        return chosen
    names = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(
            f"layers must name modules of {type(model).__name__}, got {unknown or names}; there are "
            f"{', '.join(list(modules)[1:13])}{', ...' if len(modules) > 13 else ''}"
        )
    return {name: modules[name] for name in names}
