"""Loss and accuracy along the straight line from one model's weights to another's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samopt._numerics.low_precision import widen
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, MeasuredModel, measuring
from samopt.sharpness._measuring.optimizer_parts import MovableWeights
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result, largest, mean_and_error
from samopt.sharpness._measuring.style import BLUE, ORANGE, colors
from samopt.sharpness._measuring.weights import select, trainable_layers, unwrap
from samopt.sharpness.paths.states import State, state_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Interpolation", "interpolate"]


@dataclass(frozen=True)
class Interpolation(Result):
    """What ``interpolate`` returns.

    ``value`` is the barrier: the largest height of the loss above the straight line between its ends, within [0, 1]. It
    is NaN where a loss there is.

    Attributes:
        positions: Places on the line, 0 for its start and 1 for its end.
        losses: Mean loss at each.
        errors: Standard error of each mean over batches, or None with one batch.
        accuracies: Mean accuracy at each, or None where none was asked for.
        layers: For each layer the losses where it alone moves, the others staying at the start; None where not asked.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...] | None
    accuracies: tuple[float, ...] | None
    layers: dict[str, tuple[float, ...]] | None

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the loss along the line, and the accuracy on a second axis.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        layers = self.layers or {}
        for (name, losses), shade in zip(layers.items(), colors(len(layers)), strict=True):
            axes.plot(self.positions, losses, linewidth=1, color=shade, label=name)
        line = "black" if layers else color
        axes.errorbar(self.positions, self.losses, yerr=self.errors, color=line, marker=".", label=label or "loss")
        axes.set_xlabel("position on the line between the weights: 0 start, 1 end")
        axes.set_ylabel("loss")
        if self.accuracies is not None:
            beside = axes.twinx()
            beside.plot(self.positions, self.accuracies, color=line if label else ORANGE, linestyle="--")
            beside.set_ylabel("accuracy (dashed)")


def interpolate(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    end: State,
    *,
    start: State | None = None,
    points: int = 11,
    extent: tuple[float, float] = (0.0, 1.0),
    accuracy_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    per_layer: bool | Iterable[str] = False,
    interpolate_buffers: bool = True,
    mode: str = "eval",
    progress: ProgressOption = None,
) -> Interpolation:
    """Return the loss at ``(1 - a) start + a end`` for ``a`` from one end of ``extent`` to the other.

    The barrier of linear mode connectivity is Frankle et al. 2020's; between a pretrained and a fine-tuned model the
    line is that of WiSE-FT (Wortsman et al. 2022). BatchNorm's averages fit neither end's features in the middle; with
    ``mode="train"`` the batch's own are used.

    The barrier is ``max over a of L(a) - ((1 - a) L(0) + a L(1))``.

    Misleads: permuting hidden units changes nothing that a network computes, and raises a barrier all the same.

    Cost: ``points / 3`` gradients a batch, 1/3 more for each end that is not among the places, twice that with
    accuracies, and ``points / 3`` more for each layer. Memory: one copy of the weights besides both ends.

    Args:
        model: The model that is evaluated; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches; means weigh examples.
        end: A model of the same architecture, or its state dict.
        start: Another; None for the model's present weights.
        points: Places to evaluate, >= 2, evenly spaced.
        extent: Where the places begin and end.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, such as ``sharpness.accuracy``.
        per_layer: Also move each layer alone: True for every module that holds trainable parameters itself, or names
            and patterns.
        interpolate_buffers: Interpolate buffers of floating-point numbers (BatchNorm's averages), too, instead of
            keeping the model's.
        mode: "eval", "train", or "keep".
        progress: See ``ProgressOption``.

    Returns:
        The losses along the line, and the barrier.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the weights do not fit the model.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (1 - model.weight**2).square().sum()  # two minima, at 1 and -1
        >>> ends = [{"weight": torch.tensor([[value]])} for value in (-1.0, 1.0)]
        >>> result = sharpness.interpolate(model, loss_fn, [None], ends[1], start=ends[0], points=3)
        >>> result.losses, result.value
        ((0.0, 1.0, 0.0), 1.0)
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    inner = unwrap(model)
    layers = trainable_layers(inner) if per_layer is True else list(per_layer or [])
    chosen = {name: set(select(inner, name)) for name in layers}
    low, high = extent
    positions = [low + (high - low) * point / (points - 1) for point in range(points)]
    evaluations = points * (1 + (accuracy_fn is not None) + len(layers))
    with measuring(
        model,
        loss_fn,
        batches,
        name="interpolation",
        mode=mode,
        frozen=True,
        cost_per_batch=evaluations * FORWARD,
        progress=progress,
    ) as measured:
        if interpolate_buffers:
            for state in (start, end):
                _check_buffers(inner, state)
        line = _Line(measured, state_of(inner if start is None else start, inner), state_of(end, inner))
        with measured.movable_weights() as movable:
            rows, accuracies = [], []
            for position in positions:
                line.place(movable, position, interpolate_buffers)
                rows.append([float(measured.loss(batch)) for batch in measured.batches])
                if accuracy_fn is not None:
                    values = [measured.evaluate(accuracy_fn, batch) for batch in measured.batches]
                    accuracies.append(measured.mean(values))
            at_ends = []
            for end_at in (0.0, 1.0):
                if not any(_is_at(position, end_at) for position in positions):
                    line.place(movable, end_at, interpolate_buffers)
                    at_ends.append((end_at, measured.mean_loss()))
            line.place(movable, 0.0, interpolate_buffers)
            along = {name: line.alone(movable, positions, members) for name, members in chosen.items()}
        cost = measured.progress.cost
    statistics = [mean_and_error(row, measured.sizes) for row in rows]
    losses = [mean for mean, _ in statistics]
    return Interpolation(
        measure="interpolate",
        value=_barrier([*zip(positions, losses, strict=True), *at_ends]),
        standard_error=None,
        cost=cost,
        settings={
            "points": points,
            "extent": list(extent),
            "interpolate_buffers": interpolate_buffers,
            **measured.settings,
        },
        positions=tuple(positions),
        losses=tuple(losses),
        errors=None if len(rows[0]) < 2 else tuple(error or 0.0 for _, error in statistics),
        accuracies=tuple(accuracies) if accuracy_fn is not None else None,
        layers={name: tuple(values) for name, values in along.items()} or None,
    )


class _Line:
    """The weights and buffers between two states."""

    def __init__(self, measured: MeasuredModel, start: dict[str, Tensor], end: dict[str, Tensor]) -> None:
        self._measured = measured
        own = {id(parameter): parameter for parameter in measured.weights}
        # What is about to move cannot also be where the line starts.
        self._start = {name: t.clone() if _is_among(t, own.values()) else t for name, t in start.items()}
        self._end = {name: t.clone() if _is_among(t, own.values()) else t for name, t in end.items()}
        self._refuse_other_codes()
        buffers = dict(measured.model.named_buffers())
        self._start |= {name: self._start[name].clone() for name in buffers if name in self._start}
        self._end |= {name: self._end[name].clone() for name in buffers if name in self._end}

    def place(self, movable: MovableWeights, position: float, with_buffers: bool) -> None:
        """Move all weights, and perhaps the buffers, to a position."""
        for index, name in enumerate(self._measured.names):
            movable.put(index, self._between(name, self._measured.weights[index], position))
        if not with_buffers:
            return
        with torch.no_grad():
            for name, buffer in self._measured.model.named_buffers():
                if name in self._start and name in self._end and buffer.is_floating_point():
                    buffer.copy_(self._between(name, buffer, position))
        self._measured.keep_buffers()

    def alone(self, movable: MovableWeights, positions: Sequence[float], members: set[str]) -> list[float]:
        """Return the losses where only some weights move, and put these back to the start."""
        measured = self._measured
        moving = [(index, name) for index, name in enumerate(measured.names) if name in members]
        losses: list[float] = []
        for position in (*positions, 0.0):
            for index, name in moving:
                movable.put(index, self._between(name, measured.weights[index], position))
            if len(losses) < len(positions):
                losses.append(measured.mean_loss())
        return losses

    def _refuse_other_codes(self) -> None:
        """Refuse parameters of whole numbers (quantised weights) that differ: there is nothing between two codes."""
        for name, weight in zip(self._measured.names, self._measured.weights, strict=True):
            start, end = (state[name].to(weight.device) for state in (self._start, self._end))
            if not _is_continuous(weight) and not torch.equal(start, end):
                raise ValueError(
                    f"{name!r} holds {weight.dtype} numbers that differ between the two ends, and nothing lies between "
                    "them; convert both models to floating point (dequantize them) before interpolating"
                )

    def _between(self, name: str, like: Tensor, position: float) -> Tensor:
        if not _is_continuous(like):
            return self._start[name]
        start, end = (widen(state[name].to(like.device)) for state in (self._start, self._end))
        return torch.lerp(start, end.to(start.dtype), position)  # exact at 0 and at 1


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_among(tensor: Tensor, parameters: Iterable[Tensor]) -> bool:
    pointer = tensor.untyped_storage().data_ptr()
    return any(parameter.untyped_storage().data_ptr() == pointer for parameter in parameters)


def _is_at(position: float, end: float) -> bool:
    return abs(position - end) < 1e-9  # evenly spaced places miss an end by rounding


def _barrier(places: Sequence[tuple[float, float]]) -> float:
    """Return the largest height above the chord from 0 to 1, over the places between them.

    Args:
        places: Positions with their losses, those at 0 and at 1 among them.
    """
    low, high = (next(loss for a, loss in places if _is_at(a, end)) for end in (0.0, 1.0))
    inside = [(a, loss) for a, loss in places if 0 <= a <= 1 or _is_at(a, 0.0) or _is_at(a, 1.0)]
    return largest(loss - (low + (high - low) * a) for a, loss in inside)


def _check_buffers(model: nn.Module, state: State | None) -> None:
    """Refuse weights without the buffers that are to be interpolated."""
    if not isinstance(state, Mapping):
        return
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = [
        name
        for name, tensor in model.state_dict().items()
        if name not in parameters and isinstance(tensor, Tensor) and tensor.is_floating_point()
    ]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(
            f"the weights lack the buffer {missing[0]!r} and {len(missing) - 1} more of the {len(wanted)} of "
            f"{type(model).__name__}; give a whole state dict, or interpolate_buffers=False to keep the model's own"
        )
