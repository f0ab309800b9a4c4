"""The radius for a model, a loss and data of one's own: short runs at several radii, held against each other."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samopt.sharpness._measuring.batches import read_batches
from samopt.sharpness._measuring.losses import Loss, LossFn, accuracy, as_loss_fn
from samopt.sharpness._measuring.measured_model import GRADIENT, measuring
from samopt.sharpness._measuring.optimizer_parts import RngState
from samopt.sharpness._measuring.progress import Progress, ProgressOption
from samopt.sharpness._measuring.results import Result, mean_and_error
from samopt.sharpness._measuring.seeds import seed_of
from samopt.sharpness._measuring.style import BLUE, GREY, ORANGE, finish, new_panels
from samopt.sharpness._measuring.weights import unwrap
from samopt.sharpness.radius.range_test import range_test
from samopt.variants import create

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["RhoSearch", "find_rho"]

_HELD_OUT = 4  # every fourth batch
_PIECE = 16  # examples over which validation is averaged before runs are compared
_RANGE_BATCHES = 4
_WORSE = 2.0  # standard errors by which the validation loss may exceed the base's
_ADAPTIVE = ("asam", "tram")


@dataclass(frozen=True)
class RhoSearch(Result):
    """What ``find_rho`` returns; ``value`` is the gain of the radius over the base optimizer, 0 without one.

    Attributes:
        rho: The radius to use, or None where no radius was better than the base optimizer alone.
        radii: The radii that were tried.
        score: What decides: "accuracy" or "loss", on held-out batches.
        base_score: The base optimizer's score at the end of its short run.
        gains: Score of each radius less the base's; for a loss, the base's less its own. Above 0 is better.
        errors: Standard error of each gain, paired over pieces of the held-out batches.
        loss_rises: Held-out loss of each radius less the base's.
        tested_radii: The radii of the range test, at the end of the base's run.
        rises: Rise of the training loss after SAM's ascent, for each of them.
        agreements: Cosine between the gradients at the weights and there, for each of them.
    """

    rho: float | None
    radii: tuple[float, ...]
    score: str
    base_score: float
    gains: tuple[float, ...]
    errors: tuple[float, ...]
    loss_rises: tuple[float, ...]
    tested_radii: tuple[float, ...]
    rises: tuple[float, ...]
    agreements: tuple[float, ...]

    @property
    def advice(self) -> str:
        """What to do, in a sentence."""
        best = max(range(len(self.radii)), key=self.gains.__getitem__)
        found = f"{self.gains[best]:+.3g} ± {self.errors[best]:.2g} in held-out {self.score}"
        if self.rho is None:
            return f"Train without a radius: the best of {len(self.radii)}, {self.radii[best]:g}, gained {found}."
        return f"Use rho={self.rho:g}: it gained {found} over the base optimizer alone."

    def plot(self, title: str | None = None) -> Figure:
        """Return a figure: the gain of each radius, the rise of the loss, and the agreement of both gradients.

        Args:
            title: Of the figure; None for the advice.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        figure, panels = new_panels(3)
        self.draw(panels[0])
        finish(panels[0], "after a short run")
        for axes, values, name in (
            (panels[1], self.rises, "rise of the loss after SAM's ascent"),
            (panels[2], self.agreements, "cosine between both gradients"),
        ):
            axes.semilogx(self.tested_radii, values, ".-", color=BLUE)
            axes.set_xlabel("radius rho")
            axes.set_ylabel(name)
            if self.rho is not None:
                axes.axvline(self.rho, color=ORANGE, linestyle="--", label=f"rho={self.rho:g}")
            finish(axes, "range test at the end of the base's run")
        figure.suptitle(self.advice if title is None else title, wrap=True)
        return figure

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the gain of each radius over the base.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        axes.errorbar(self.radii, self.gains, yerr=self.errors, fmt="o-", color=color, capsize=3, label=label)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("radius rho")
        axes.set_ylabel(f"gain in held-out {self.score}")


def find_rho(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    optimizer: Optimizer | Callable[[Any], Optimizer],
    radii: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    variant: str = "sam",
    validation: Iterable[Any] | None = None,
    accuracy_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    steps: int = 300,
    folds: int = 1,
    seed: int = 0,
    progress: ProgressOption = None,
) -> RhoSearch:
    """Return the radius to train with, or None where sharpness-aware training does not help.

    Copies of the model are trained for ``steps`` steps from where it is: with the base optimizer alone, and with each
    radius around it, on the same batches with the same random numbers and a learning rate that falls to 0 along half a
    cosine. The radius with the best score on held-out batches is returned if it beats the base by more than one
    standard error, and if its held-out loss is not clearly worse. The score is the accuracy where labels are classes,
    since label noise moves the loss more than the accuracy; otherwise the loss.

    Start from the model as it will be trained: a fresh one for training from scratch, a pretrained one for
    fine-tuning. The longer ``steps`` and the more held-out batches, the closer to the run itself: labels are memorised
    only in longer runs. A gain smaller than its error is not seen; ``folds`` hold out other batches and cost as much
    again.

    Cost: ``folds * steps * (1 + 2 * len(radii))`` gradients of one batch, and about 100 for the range test. Memory: a
    copy of the model and of the optimizer's state, with one more copy of the weights.

    Args:
        model: The model; it and the optimizer come back bit for bit, since copies are trained.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Training batches, read once and kept: those of an epoch, or as many as ``steps`` needs.
        optimizer: The base optimizer over the model's parameters, or a function that makes it from parameters, as in
            ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``.
        radii: What to try, each > 0; for "asam" about ten times larger ones.
        variant: Name of a samopt optimizer with a radius ``rho``, see ``samopt.available()``.
        validation: Batches to compare on; None holds out every fourth of ``batches``.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, higher is better; None is ``sharpness.accuracy`` where
            labels are whole numbers.
        steps: Length of each run, >= 1.
        folds: How many times to hold out other batches, 1 to 4; 1 with ``validation``.
        seed: Decides the random numbers of the runs.
        progress: See ``ProgressOption``.

    Returns:
        ``.rho``, and what it was chosen from; ``.plot()`` draws it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or there are too few batches.

    Example:
        >>> import torch, samopt
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = torch.nn.Linear(10, 2)
        >>> batches = [(torch.randn(32, 10), torch.randint(2, (32,))) for _ in range(8)]  # nothing to learn
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> search = samopt.find_rho(model, torch.nn.CrossEntropyLoss(), batches, optimizer=base, steps=20)
        >>> search.rho in (None, *search.radii)
        True
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not radii or any(not 0 < radius < math.inf for radius in radii):
        raise ValueError(f"radii must be positive numbers, got {list(radii)}")
    if not 1 <= folds <= (1 if validation is not None else _HELD_OUT):
        raise ValueError(f"folds must be between 1 and {_HELD_OUT}, and 1 with validation=, got {folds}")
    compute_loss = as_loss_fn(loss_fn)
    inner = unwrap(model)
    devices = {parameter.device for parameter in inner.parameters()}
    before = RngState.capture(devices)
    try:
        limit = -(-steps * _HELD_OUT // (_HELD_OUT - 1)) + _HELD_OUT
        kept = read_batches(itertools.islice(batches, limit))
        splits = _splits(kept, validation, folds)
        measure_accuracy = accuracy_fn or (accuracy if _has_classes(inner, compute_loss, kept[0]) else None)
        counter = Progress(progress, "find_rho", float(folds * steps * (1 + 2 * len(radii))))
        try:
            runs: list[list[_Score]] = [[] for _ in range(1 + len(radii))]
            for fold, (training, held_out) in enumerate(splits):
                for number, radius in enumerate((0.0, *radii)):
                    torch.manual_seed(seed_of("find_rho", seed, fold))
                    trained = _train(inner, optimizer, compute_loss, training, radius, variant, steps, counter)
                    runs[number].append(_score(trained, compute_loss, held_out, measure_accuracy))
                    if fold == 0 and number == 0:
                        tested = _grid(radii)
                        chosen = training[:_RANGE_BATCHES]
                        rises, agreements = range_test(trained, compute_loss, chosen, tested, variant in _ADAPTIVE)
            cost = counter.cost
        finally:
            counter.close()
    finally:
        before.restore()
    return _decide(
        runs,
        tuple(float(radius) for radius in radii),
        cost,
        {"model": type(inner).__name__, "variant": variant, "steps": steps, "folds": folds, "seed": seed},
        {"tested_radii": tuple(tested), "rises": tuple(rises), "agreements": tuple(agreements)},
    )


@dataclass(frozen=True)
class _Score:
    """Validation of one run, piece by piece."""

    losses: list[float]
    accuracies: list[float] | None
    sizes: list[int]


def _splits(kept: list[Any], validation: Iterable[Any] | None, folds: int) -> list[tuple[list[Any], list[Any]]]:
    if validation is not None:
        return [(kept, read_batches(validation))]
    if len(kept) < _HELD_OUT:
        raise ValueError(
            f"find_rho holds out every {_HELD_OUT}th batch, but there are only {len(kept)}; give more and smaller "
            "batches, or others with validation="
        )
    places = range(len(kept))
    return [
        (
            [kept[place] for place in places if place % _HELD_OUT != _HELD_OUT - 1 - fold],
            [kept[place] for place in places if place % _HELD_OUT == _HELD_OUT - 1 - fold],
        )
        for fold in range(folds)
    ]


def _train(
    model: nn.Module,
    optimizer: Any,
    compute_loss: LossFn,
    batches: Sequence[Any],
    radius: float,
    variant: str,
    steps: int,
    counter: Progress,
) -> nn.Module:
    """Return a copy of the model, trained for some steps."""
    with torch.inference_mode(False), torch.enable_grad():
        twin, base = _copied(model, optimizer)
        trained: Any = base if radius == 0 else create(variant, base, model=twin, rho=radius)
        rates = [group["lr"] for group in base.param_groups]
        twin.train()
        for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps)):
            for group, rate in zip(base.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))

            def closure(batch: Any = batch) -> Tensor:
                trained.zero_grad()
                loss = compute_loss(twin, batch)
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
                return loss

            trained.step(closure)
            counter.advance(GRADIENT if radius == 0 else 2 * GRADIENT)
        if radius and hasattr(trained, "detach"):
            trained.detach()
    return twin


def _copied(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Optimizer]:
    while isinstance(inner := getattr(optimizer, "base_optimizer", None), Optimizer):
        optimizer = inner
    if isinstance(optimizer, Optimizer):
        own = {id(parameter) for parameter in model.parameters()}
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(id(parameter) in own for parameter in given):
            raise ValueError("optimizer updates none of the model's parameters; give the optimizer of this model")
        twin, base = copy.deepcopy((model, optimizer))
        return twin, base
    if not callable(optimizer):
        raise TypeError(
            f"optimizer must be a torch optimizer, or a function that makes one, got {type(optimizer).__name__}"
        )
    twin = copy.deepcopy(model)
    return twin, optimizer([parameter for parameter in twin.parameters() if parameter.requires_grad])


def _score(model: nn.Module, compute_loss: LossFn, batches: list[Any], measure_accuracy: Any) -> _Score:
    try:
        pieces = [piece for batch in batches for piece in _pieces(batch)]
    except TypeError:  # a batch that cannot be cut
        pieces = batches
    with measuring(model, compute_loss, pieces, name="validation", frozen=True, progress=False) as measured:
        losses = [float(measured.loss(piece)) for piece in measured.batches]
        hits = None if measure_accuracy is None else [measured.evaluate(measure_accuracy, p) for p in measured.batches]
        return _Score(losses, hits, list(measured.sizes))


def _pieces(batch: Any) -> list[Any]:
    return read_batches([batch], _PIECE, keep_rest=True)


def _has_classes(model: nn.Module, compute_loss: LossFn, batch: Any) -> bool:
    """Return whether an accuracy can be measured on a batch."""
    with measuring(model, compute_loss, [batch], name="accuracy", frozen=True, progress=False) as measured:
        try:
            value = measured.evaluate(accuracy, measured.batches[0])
        except (TypeError, AttributeError, RuntimeError, IndexError):
            return False
    labels = batch[1] if isinstance(batch, tuple | list) else batch.get("labels")
    return isinstance(labels, Tensor) and not labels.is_floating_point() and math.isfinite(value)


def _grid(radii: Sequence[float]) -> list[float]:
    low, high = min(radii) / 3, max(radii) * 3
    count = 9
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


def _decide(
    runs: Sequence[Sequence[_Score]],
    radii: tuple[float, ...],
    cost: float,
    settings: dict[str, Any],
    tested: dict[str, Any],
) -> RhoSearch:
    base, *others = runs
    has_accuracy = all(score.accuracies is not None for row in runs for score in row)
    sizes = [size for score in base for size in score.sizes]
    gains, errors, rises, allowed = [], [], [], []
    for row in others:
        loss_gap = [
            b - a for one, other in zip(base, row, strict=True) for a, b in zip(one.losses, other.losses, strict=True)
        ]
        loss_rise, loss_error = mean_and_error(loss_gap, sizes)
        if has_accuracy:
            gap = [
                b - a
                for one, other in zip(base, row, strict=True)
                for a, b in zip(one.accuracies or [], other.accuracies or [], strict=True)
            ]
        else:
            gap = [-part for part in loss_gap]
        gain, error = mean_and_error(gap, sizes)
        finite = math.isfinite(gain) and math.isfinite(loss_rise)
        gains.append(gain if finite else -math.inf)
        errors.append(error or 0.0)
        rises.append(loss_rise)
        allowed.append(finite and gain > (error or 0.0) and loss_rise <= _WORSE * (loss_error or 0.0))
    good = [index for index in range(len(radii)) if allowed[index]]
    best = max(good, key=gains.__getitem__) if good else None
    base_values = [value for score in base for value in ((score.accuracies or []) if has_accuracy else score.losses)]
    return RhoSearch(
        measure="find_rho",
        value=0.0 if best is None else gains[best],
        standard_error=None if best is None else errors[best],
        cost=cost,
        settings=settings,
        rho=None if best is None else radii[best],
        radii=radii,
        score="accuracy" if has_accuracy else "loss",
        base_score=mean_and_error(base_values, sizes)[0],
        gains=tuple(gains),
        errors=tuple(errors),
        loss_rises=tuple(rises),
        **tested,
    )
