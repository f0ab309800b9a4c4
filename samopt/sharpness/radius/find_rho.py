"""The radius for a model, a loss and data of one's own: short runs at several radii, held against each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samopt.sharpness._measuring.batches import fresh, read_batches
from samopt.sharpness._measuring.losses import Loss, LossFn, as_loss_fn, copied_with_loss, modules_of
from samopt.sharpness._measuring.measured_model import GRADIENT, accuracy_for, measuring
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
_CLEARLY = 2.0  # standard errors beyond which a difference is no longer taken for noise
_RADIUS_LABEL = "radius rho (norm of the ascent)"
_ADAPTIVE = ("asam", "tram")


@dataclass(frozen=True)
class RhoSearch(Result):
    """What ``find_rho`` returns; ``value`` is the gain of the radius over the base optimizer, 0 without one.

    Attributes:
        rho: The radius to use, or None where no radius was better than the base optimizer alone.
        radii: The radii that were tried.
        score: What decides: "accuracy" or "loss", on held-out batches.
        base_score: The base optimizer's score at the end of its short run.
        gains: Score of each radius less the base's; for a loss, the base's less its own. Above 0 is better; ``-inf``
            where the loss was not finite.
        errors: Standard error of each gain: that over pieces of the held-out batches or that over folds, the larger.
        loss_rises: Held-out loss of each radius less the base's.
        fold_gains: Gain of each radius in each fold that it took part in: fewer than all where it dropped out.
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
    fold_gains: tuple[tuple[float, ...], ...]
    tested_radii: tuple[float, ...]
    rises: tuple[float, ...]
    agreements: tuple[float, ...]

    @property
    def advice(self) -> str:
        """What to do, in a sentence."""
        # Radii that stayed in longest first: the gain of one that dropped out is from fewer examples.
        best = max(range(len(self.radii)), key=lambda index: (len(self.fold_gains[index]), self.gains[index]))
        if self.rho is not None:
            best = self.radii.index(self.rho)
        found = f"{self.gains[best]:+.3g} ± {self.errors[best]:.2g} in held-out {self.score}"
        if self.rho is not None:
            return f"Use rho={self.rho:g}: it gained {found} over the base optimizer alone."
        if not math.isfinite(self.gains[best]):
            return f"Train without a radius: with none of {len(self.radii)} did the held-out loss stay finite."
        but = ""
        if self.gains[best] > _CLEARLY * self.errors[best]:
            but = f", but raised the held-out loss by {self.loss_rises[best]:.2g}"
        elif self.gains[best] > 0:
            but = ", less than two standard errors"
        return f"Train without a radius: the best of {len(self.radii)}, {self.radii[best]:g}, gained {found}{but}."

    def plot(self, title: str | None = None) -> Figure:
        """Return a figure: the gain of each radius, the rise of the loss, and the agreement of both gradients.

        Args:
            title: Of the figure; None for the advice.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        figure, panels = new_panels(3)
        self.draw(panels[0])
        finish(panels[0], f"after {self.settings['steps']} steps, ± standard error")
        for axes, values, name in (
            (panels[1], self.rises, "rise of the loss after SAM's ascent"),
            (panels[2], self.agreements, "cosine between both gradients"),
        ):
            axes.semilogx(self.tested_radii, values, ".-", color=BLUE)
            axes.set_xlabel(_RADIUS_LABEL)
            axes.set_ylabel(name)
            if values is self.rises and all(rise > 0 for rise in values):
                axes.set_yscale("log")
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
        finite = [index for index, gain in enumerate(self.gains) if math.isfinite(gain)]
        chosen = [[values[index] for index in finite] for values in (self.radii, self.gains, self.errors)]
        axes.errorbar(chosen[0], chosen[1], yerr=chosen[2], fmt="o-", color=color, capsize=3, label=label)
        folds = [(self.radii[index], gain) for index in finite for gain in self.fold_gains[index]]
        if len(folds) > len(finite):
            axes.plot(*zip(*folds, strict=True), ".", color=GREY, markersize=4, zorder=1, label="each fold")
        for radius in (radius for index, radius in enumerate(self.radii) if index not in finite):
            axes.axvline(radius, color=GREY, linestyle=":", label=f"rho={radius:g}: loss not finite")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel(_RADIUS_LABEL)
        axes.set_ylabel(f"gain in held-out {self.score}{' (fraction)' if self.score == 'accuracy' else ''}")


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
    folds: int | None = None,
    seed: int = 0,
    progress: ProgressOption = None,
) -> RhoSearch:
    """Return the radius to train with, or None where sharpness-aware training does not help.

    Copies of the model are trained for ``steps`` steps from where it is: with the base optimizer alone, and with each
    radius around it, on the same batches with the same random numbers and a learning rate that falls to 0 along half a
    cosine. They are compared on a fourth of the batches, which is held out. This is done four times, so that every
    batch is held out once. A radius drops out if its loss is not finite or, from the second fold on, if its score is
    more than two standard errors below that of the base or of another radius. Of those that are left, the one with the
    best score is returned if it beats the base by more than two standard errors and its held-out loss is not more than
    two standard errors above the base's. (With one standard error, four radii whose gains were independent chance would
    be recommended in half of all searches.) A standard error is that over examples or that over folds, the larger:
    two runs end at different accuracies by chance, too, which the examples of one fold do not show. The score is the
    accuracy where each example has one label that is a class, since label noise moves the loss more than the accuracy;
    otherwise the loss.

    Start from the model as it will be trained: a fresh one for training from scratch, a pretrained one for
    fine-tuning. The longer ``steps`` and the more held-out examples, the closer to the run itself: labels are memorised
    only in longer runs. A gain smaller than twice its error is not seen.

    Cost: at most ``folds * steps * (1 + 2 * len(radii))`` gradients of one batch, less what radii that drop out save,
    and about 40 for the range test. Memory: a copy of the model and of the optimizer's state, with one more copy of the
    weights.

    Args:
        model: The model; it and the optimizer come back bit for bit, since copies are trained.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Training batches, read once and kept: those of an epoch, or as many as ``steps`` needs.
        optimizer: The base optimizer over the model's parameters, or a function that makes it from parameters, as in
            ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``. Its learning rate is the largest among the
            present one and those (``initial_lr``, ``max_lr``) that a schedule has noted in the group.
        radii: What to try, each > 0; for "asam" about ten times larger ones.
        variant: Name of a samopt optimizer with a radius ``rho``, see ``samopt.available()``.
        validation: Batches to compare on; None holds out every fourth of ``batches``.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, higher is better; None is ``sharpness.accuracy`` where
            each example has one label, a whole number, and the model two or more outputs for it.
        steps: Length of each run, >= 1.
        folds: How many times to hold out other batches, 1 to 4; None for 4, or 1 with ``validation``. Fewer cost less
            and see less: the error falls with the root of their number.
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
    most = 1 if validation is not None else _HELD_OUT
    folds = most if folds is None else folds
    if not 1 <= folds <= most:
        raise ValueError(f"folds must be between 1 and {_HELD_OUT}, and 1 with validation=, got {folds}")
    compute_loss = as_loss_fn(loss_fn)
    inner = unwrap(model)
    devices = {parameter.device for parameter in inner.parameters()}
    before = RngState.capture(devices)
    try:
        limit = -(-steps * _HELD_OUT // (_HELD_OUT - 1)) + _HELD_OUT
        kept = read_batches(batches, at_most=limit)
        splits = _splits(kept, validation, folds)
        measure_accuracy = accuracy_fn or accuracy_for(inner, compute_loss, kept[0])
        twin, base, _ = _copied(inner, optimizer, compute_loss)
        create(variant, base, model=twin, rho=radii[0])  # so that a variant without a radius fails before the runs
        if not any(float(_peak_rate(group)) > 0 for group in base.param_groups):
            raise ValueError("the optimizer's learning rate is 0, so no run would train; give it the run's own")
        del twin, base
        counter = Progress(progress, "find_rho", float(folds * steps * (1 + 2 * len(radii))))
        try:
            runs: list[list[_Score]] = [[] for _ in range(1 + len(radii))]
            left = list(range(1, len(runs)))
            for fold, (training, held_out) in enumerate(splits):
                for number in (0, *left):
                    before.restore()
                    torch.manual_seed(seed_of("find_rho", seed, fold))
                    radius = radii[number - 1] if number else 0.0
                    trained, own_loss = _train(
                        inner, optimizer, compute_loss, training, radius, variant, steps, counter
                    )
                    runs[number].append(_score(trained, own_loss, held_out, measure_accuracy))
                    if fold == 0 and number == 0:
                        tested = _grid(radii)
                        chosen = training[:_RANGE_BATCHES]
                        rises, agreements = range_test(
                            trained, own_loss, chosen, tested, "asam" if variant in _ADAPTIVE else False
                        )
                _check_base(runs[0], steps)
                left = _still_possible(runs, left)
                if not left:
                    break
            cost = counter.cost
        finally:
            counter.close()
    finally:
        before.restore()
    return _decide(
        runs,
        left,
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
            f"find_rho holds out every {_HELD_OUT}th batch, so it needs {_HELD_OUT} or more, but got {len(kept)}; give "
            "more and smaller batches, or others with validation="
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
) -> tuple[nn.Module, LossFn]:
    """Return a copy of the model, trained for some steps, and of the loss, whose weights and state it went through."""
    with torch.inference_mode(False), torch.enable_grad():
        twin, base, loss_fn = _copied(model, optimizer, compute_loss)
        trained: Any = base if radius == 0 else create(variant, base, model=[twin, *modules_of(loss_fn)], rho=radius)
        rates = [_peak_rate(group) for group in base.param_groups]
        twin.train()
        for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps)):
            for group, rate in zip(base.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))

            def closure(batch: Any = batch) -> Tensor:
                trained.zero_grad()
                loss = loss_fn(twin, fresh(batch))
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
                return loss

            trained.step(closure)
            counter.advance(GRADIENT if radius == 0 else 2 * GRADIENT)
        if radius and hasattr(trained, "detach"):
            trained.detach()
    return twin, loss_fn


def _peak_rate(group: dict[str, Any]) -> Any:
    """Return a group's learning rate, before what a schedule has made of it: one that warms up begins at 0 or near."""
    return max((group[name] for name in ("lr", "initial_lr", "max_lr") if name in group), key=float)


def _copied(model: nn.Module, optimizer: Any, loss: LossFn) -> tuple[nn.Module, Optimizer, LossFn]:
    while isinstance(inner := getattr(optimizer, "base_optimizer", None), Optimizer):
        optimizer = inner
    if isinstance(optimizer, Optimizer):
        own = {id(parameter) for parameter in model.parameters()}
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(id(parameter) in own for parameter in given):
            raise ValueError("optimizer updates none of the model's parameters; give the optimizer of this model")
        twin, own_loss, base = copied_with_loss(model, loss, optimizer)
        return twin, base, own_loss
    if not callable(optimizer):
        raise TypeError(
            f"optimizer must be a torch optimizer, or a function that makes one, got {type(optimizer).__name__}"
        )
    twin, own_loss, _ = copied_with_loss(model, loss)
    return twin, optimizer([parameter for parameter in twin.parameters() if parameter.requires_grad]), own_loss


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


def _grid(radii: Sequence[float]) -> list[float]:
    low, high = min(radii) / 3, max(radii) * 3
    count = 9
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


@dataclass(frozen=True)
class _Gap:
    """By how much one radius is better than another, over the folds that both took part in."""

    gain: float
    error: float
    fold_gains: tuple[float, ...]
    loss_rise: float
    loss_error: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.gain) and math.isfinite(self.loss_rise)

    @property
    def is_clearly_worse(self) -> bool:
        return not self.is_finite or self.gain < -_CLEARLY * self.error

    @property
    def is_clearly_better(self) -> bool:
        return self.is_finite and self.gain > _CLEARLY * self.error and self.loss_rise <= _CLEARLY * self.loss_error


def _gap(one: Sequence[_Score], other: Sequence[_Score]) -> _Gap:
    """Return by how much ``other`` is better than ``one``, paired piece by piece."""
    pairs = list(zip(one, other, strict=False))  # a radius that dropped out has fewer folds
    sizes = [first.sizes for first, _ in pairs]
    rises = [_differences(first.losses, second.losses) for first, second in pairs]
    loss_rise, loss_error, fold_rises = _mean_over_folds(rises, sizes)
    if one[0].accuracies is None:
        return _Gap(-loss_rise, loss_error, tuple(-rise for rise in fold_rises), loss_rise, loss_error)
    gains = [_differences(first.accuracies or [], second.accuracies or []) for first, second in pairs]
    gain, error, fold_gains = _mean_over_folds(gains, sizes)
    return _Gap(gain, error, tuple(fold_gains), loss_rise, loss_error)


def _differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(one, other, strict=True)]


def _mean_over_folds(values: Sequence[list[float]], sizes: Sequence[list[int]]) -> tuple[float, float, list[float]]:
    """Return the mean, its standard error, and the mean of each fold.

    Two runs also differ by chance, which all examples of a fold share. The error over pieces does not see that; the
    error over folds does, but is itself uncertain, since there are four at most. So the larger one is taken.
    """
    mean, error = mean_and_error([v for fold in values for v in fold], [n for fold in sizes for n in fold])
    means = [mean_and_error(fold, of)[0] for fold, of in zip(values, sizes, strict=True)]
    _, over_folds = mean_and_error(means, [sum(of) for of in sizes])
    known = [each for each in (error, over_folds) if each is not None]
    return mean, max(known, default=math.inf), means


def _check_base(base: Sequence[_Score], steps: int) -> None:
    losses = [loss for score in base for loss in score.losses]
    bad = next((loss for loss in losses if not math.isfinite(loss)), None)
    if bad is not None:
        raise ValueError(
            f"the base optimizer alone ends with a held-out loss of {bad} after {steps} steps, so no radius can be "
            "compared with it; lower its learning rate, or look at loss_fn and the batches"
        )


def _still_possible(runs: Sequence[Sequence[_Score]], left: Sequence[int]) -> list[int]:
    """Return the radii that neither the base nor another radius clearly beats.

    After a single fold, which does not tell how much is chance between runs, only those without a finite loss go.
    """
    gaps = {number: _gap(runs[0], runs[number]) for number in left}
    if len(runs[0]) == 1:
        return [number for number in left if gaps[number].is_finite]
    leader = max((n for n in left if gaps[n].is_finite), key=lambda n: gaps[n].gain, default=0)
    if leader and gaps[leader].gain < 0:
        leader = 0
    return [n for n in left if gaps[n].is_finite and (n == leader or not _gap(runs[leader], runs[n]).is_clearly_worse)]


def _decide(
    runs: Sequence[Sequence[_Score]],
    left: Sequence[int],
    radii: tuple[float, ...],
    cost: float,
    settings: dict[str, Any],
    tested: dict[str, Any],
) -> RhoSearch:
    base, *others = runs
    has_accuracy = base[0].accuracies is not None
    base_values = [value for score in base for value in ((score.accuracies or []) if has_accuracy else score.losses)]
    gaps = [_gap(base, other) for other in others]
    gains = [gap.gain if gap.is_finite else -math.inf for gap in gaps]
    if len(base_values) < 2:
        raise ValueError(
            f"the runs are compared on {_PIECE} held-out examples at a time, but there is one such piece only, which "
            "tells no standard error; give more batches or folds"
        )
    good = [number - 1 for number in left if gaps[number - 1].is_clearly_better]
    best = max(good, key=gains.__getitem__) if good else None
    return RhoSearch(
        measure="find_rho",
        value=0.0 if best is None else gains[best],
        standard_error=None if best is None else gaps[best].error,
        cost=cost,
        settings=settings,
        rho=None if best is None else radii[best],
        radii=radii,
        score="accuracy" if has_accuracy else "loss",
        base_score=mean_and_error(base_values, [size for score in base for size in score.sizes])[0],
        gains=tuple(gains),
        errors=tuple(gap.error if gap.is_finite else math.nan for gap in gaps),
        loss_rises=tuple(gap.loss_rise for gap in gaps),
        fold_gains=tuple(gap.fold_gains for gap in gaps),
        **tested,
    )
