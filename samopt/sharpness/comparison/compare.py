"""Several models side by side: one row a measure, one column a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from samopt._numerics.low_precision import widen
from samopt.sharpness._measuring.batches import batch_size, read_batches
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, measuring
from samopt.sharpness._measuring.optimizer_parts import vector_norm
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result, mean_and_error, plain
from samopt.sharpness._measuring.style import colors, finish, new_panels
from samopt.sharpness._measuring.weights import select, unwrap
from samopt.sharpness.comparison.differences import Difference, difference
from samopt.sharpness.comparison.verdict import verdict
from samopt.sharpness.presets import Measure, Measures, named_measures
from samopt.sharpness.robustness.forgetting import forgetting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COMPARED", "Comparison", "MeanOverBatches", "compare"]

COMPARED = ("worst_case", "worst_case_plain", "weight_noise", "lambda_max", "trace", "quantization")
"""What ``compare`` measures by default."""


@dataclass(frozen=True)
class MeanOverBatches(Result):
    """A number of the unmoved model: its loss or its accuracy.

    Attributes:
        per_batch: The number for each batch.
    """

    per_batch: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` returns.

    Attributes:
        models: Names of the models; differences are to the first.
        results: For each measure the result of each model.
        differences: For each measure the difference of each further model to the first.
        norms: The l2 norm of each model's trainable weights.
        verdict: What agrees, what does not, and which measure to believe.
        cost: What it cost, in gradients of one batch.
    """

    models: tuple[str, ...]
    results: dict[str, dict[str, Result]]
    differences: dict[str, dict[str, Difference]]
    norms: dict[str, float]
    verdict: str
    cost: float

    def table(self) -> str:
        """Return the values and differences as text: one row a measure."""
        first, *others = self.models
        head = ["measure", *self.models, *(f"{name} - {first}" for name in others)]
        lines = [head]
        for label, results in self.results.items():
            values = [_with_error(results[name].value, results[name].standard_error) for name in self.models]
            apart = [self.differences[label][name] for name in others]
            lines.append(
                [
                    label,
                    *values,
                    *(_with_error(d.value, d.standard_error) + ("" if d.is_clear else " ~") for d in apart),
                ]
            )
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:], "~ within the error (95%)"])

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dicts, ready for JSON."""
        return {
            "models": list(self.models),
            "verdict": self.verdict,
            "cost": self.cost,
            "norms": dict(self.norms),
            "results": plain(self.results),
            "differences": {
                label: {name: vars(apart).copy() for name, apart in row.items()}
                for label, row in self.differences.items()
            },
        }

    def plot(self, title: str | None = None) -> Figure:
        """Return a figure: every measure relative to the first model, then a panel a measure with all models in it.

        Args:
            title: Its title; None for the models' names.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        drawn = {label: row for label, row in self.results.items() if _has_curves(row)}
        figure, panels = new_panels(1 + len(drawn))
        shades = dict(zip(self.models, colors(len(self.models)), strict=True))
        self._draw_ratios(panels[0], shades)
        for axes, (label, row) in zip(panels[1:], drawn.items(), strict=True):
            for name, result in row.items():
                result.draw(axes, label=name, color=shades[name])
            finish(axes, label.replace("_", " "))
        figure.suptitle(" and ".join(self.models) if title is None else title)
        return figure

    def _draw_ratios(self, axes: Axes, shades: Mapping[str, str]) -> None:
        """Draw each further model's value, divided by the first one's."""
        first, *others = self.models
        positive = [
            label
            for label, row in self.results.items()
            if all(result.value > 0 and not isinstance(result, MeanOverBatches) for result in row.values())
        ]
        for name in others:
            for row, label in enumerate(positive):
                base = self.results[label][first].value
                apart = self.differences[label][name]
                axes.errorbar(
                    [1 + apart.value / base],
                    [row],
                    xerr=None if apart.standard_error is None else [2 * apart.standard_error / base],
                    fmt="o",
                    color=shades[name],
                    capsize=3,
                    label=name if row == 0 else None,
                )
        axes.axvline(1, color=shades[first], label=first)
        axes.set_yticks(range(len(positive)), [label.replace("_", " ") for label in positive])
        axes.invert_yaxis()
        axes.set_xlabel(f"value, relative to {first} (± 2 standard errors)")
        finish(axes, "below 1: flatter")


def compare(
    models: Mapping[str, nn.Module],
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    measures: Measures = COMPARED,
    elsewhere: Iterable[Any] | None = None,
    accuracy_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    mode: str = "eval",
    progress: ProgressOption = None,
) -> Comparison:
    """Return what several measures say about several models, and whether they agree.

    Every measure runs on the same batches, with the same random numbers for each model, so differences are taken batch
    by batch and are known better than the values. A difference is called clear where its 95% interval (Student's t over
    the batches) leaves out 0; give at least 5 batches.

    Cost: that of the measures, for each model; by default about 170 gradients a batch, most of them for ``lambda_max``
    and ``trace``. Memory: as the measures.

    Args:
        models: At least two models, by name; differences are to the first. Each comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches; read once.
        measures: Names of presets ("worst_case" and "average_case", adaptive; "worst_case_plain"; "one_step";
            "lambda_max"; "trace"; "weight_noise"; "quantization"; "per_layer"), or functions, as for the monitors.
        elsewhere: Batches of other data; with them, ``forgetting`` is measured, too.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, such as ``sharpness.accuracy``: one more row.
        mode: "eval", "train", or "keep".
        progress: See ``ProgressOption``.

    Returns:
        The table, the differences with their standard errors, and a verdict in words.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are fewer than two models, or an option is out of range.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> models = {"narrow": torch.nn.Linear(2, 1, bias=False), "wide": torch.nn.Linear(2, 1, bias=False)}
        >>> for name, curvature in (("narrow", 4.0), ("wide", 1.0)):
        ...     models[name].weight.data = torch.tensor([[0.0, curvature]])
        >>> def loss_fn(model, batch):
        ...     return (model.weight[0, 0] * model.weight[0, 1]) ** 2 + 0.1
        >>> comparison = sharpness.compare(models, loss_fn, [None], measures=["lambda_max", "worst_case_plain"])
        >>> comparison.verdict.partition(" (")[0]
        'wide is flatter by every measure that tells the two apart'
    """
    if not isinstance(models, Mapping) or not all(isinstance(model, nn.Module) for model in models.values()):
        raise TypeError('models must be a mapping from names to modules, as in {"sgd": model_a, "sam": model_b}')
    if len(models) < 2:
        raise ValueError(f"compare needs at least two models, got {len(models)}")
    kept = read_batches(batches)
    chosen: dict[str, Measure] = {"loss": mean_loss}
    if accuracy_fn is not None:
        chosen["accuracy"] = _accuracy_of(accuracy_fn)
    chosen |= named_measures(measures)
    if elsewhere is not None:
        other = read_batches(elsewhere)
        chosen["forgetting"] = lambda model, loss, data, **options: forgetting(model, loss, data, other, **options)
    results: dict[str, dict[str, Result]] = {}
    for label, measure in chosen.items():
        results[label] = {}
        for name, model in models.items():
            results[label][name] = measure(model, loss_fn, kept, mode=mode, progress=progress)
    names = tuple(models)
    sizes = [batch_size(batch) for batch in kept]
    differences = {
        label: {name: difference(row[names[0]], row[name], sizes) for name in names[1:]}
        for label, row in results.items()
    }
    norms = {name: _weight_norm(model) for name, model in models.items()}
    counts = {name: sum(w.numel() for w in select(unwrap(model)).values()) for name, model in models.items()}
    return Comparison(
        models=names,
        results=results,
        differences=differences,
        norms=norms,
        verdict="\n".join(
            verdict(
                (names[0], name),
                {label: (row[names[0]], row[name], differences[label][name]) for label, row in results.items()},
                (norms[names[0]], norms[name]),
                (results["loss"][names[0]].value, results["loss"][name].value),
                (counts[names[0]], counts[name]),
            )
            for name in names[1:]
        ),
        cost=sum(result.cost for row in results.values() for result in row.values()),
    )


def mean_loss(
    model: nn.Module, loss_fn: Loss, batches: Iterable[Any], *, mode: str = "eval", progress: ProgressOption = None
) -> MeanOverBatches:
    """Return the mean loss, with its standard error over batches; costs 1/3 gradient a batch.

    Args:
        model: The model.
        loss_fn: The loss.
        batches: Batches; means weigh examples.
        mode: "eval", "train", or "keep".
        progress: See ``ProgressOption``.
    """
    with measuring(
        model, loss_fn, batches, name="loss", mode=mode, frozen=True, cost_per_batch=FORWARD, progress=progress
    ) as measured:
        values = tuple(float(measured.loss(batch)) for batch in measured.batches)
        value, error = mean_and_error(values, measured.sizes)
        return MeanOverBatches("mean_loss", value, error, measured.progress.cost, measured.settings, values)


def _accuracy_of(accuracy_fn: Callable[[nn.Module, Any], Tensor]) -> Measure:
    def measure(model: nn.Module, loss_fn: Loss, batches: Iterable[Any], **options: Any) -> Result:
        with measuring(model, loss_fn, batches, name="accuracy", frozen=True, **options) as measured:
            values = tuple(measured.evaluate(accuracy_fn, batch) for batch in measured.batches)
            value, error = mean_and_error(values, measured.sizes)
            return MeanOverBatches("mean_accuracy", value, error, measured.progress.cost, measured.settings, values)

    return measure


def _weight_norm(model: nn.Module) -> float:
    inner = unwrap(model)
    squares = [float(vector_norm(widen(weight.detach()))) ** 2 for weight in select(inner).values()]
    return float(sum(squares) ** 0.5)


def _has_curves(row: Mapping[str, Result]) -> bool:
    return all(type(result).draw is not Result.draw for result in row.values())


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {float(f'{error:.2g}'):g}"
