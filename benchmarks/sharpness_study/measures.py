"""What is measured of every trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from samopt import sharpness

__all__ = ["LANDSCAPE_PLACES", "MEASURES", "Measure", "measure_model"]

_SEARCH = partial(sharpness.worst_case, rho=0.05, steps=20)
_LONG_SEARCH = partial(sharpness.worst_case, rho=0.05, steps=100, restarts=3)
_LANDSCAPE = partial(sharpness.landscape, points=21, radius=0.5)
LANDSCAPE_PLACES = [(point - 10) / 20 for point in range(21)]
"""Where the loss is evaluated along one random direction, in which every filter has the norm of the model's own."""


@dataclass(frozen=True)
class Measure:
    """A measure with its settings.

    Attributes:
        name: Its key among a row's metrics.
        label: What tables and figures call it.
        compute: The measure.
    """

    name: str
    label: str
    compute: Callable[..., sharpness.Result]


MEASURES = (
    Measure("one_step", "one step of SAM, rho 0.05", partial(sharpness.worst_case, rho=0.05, steps=1)),
    Measure("worst_case", "worst case, rho 0.05", _SEARCH),
    Measure(
        "worst_case_adaptive",
        "worst case, adaptive, rho 0.5",
        partial(sharpness.worst_case, rho=0.5, steps=20, adaptive=True),
    ),
    Measure(
        "worst_case_linf",
        "worst case, adaptive l-inf, rho 0.01, normalised logits",
        partial(sharpness.worst_case, rho=0.01, steps=20, adaptive=True, norm="linf", normalize_logits=True),
    ),
    Measure(
        "average_case",
        "average case, adaptive, rho 0.05",
        partial(sharpness.average_case, rho=0.05, samples=10, adaptive=True),
    ),
    Measure("lambda_max", "largest Hessian eigenvalue", partial(sharpness.hessian_eigenvalues, tolerance=0.01)),
    Measure("trace", "Hessian trace", partial(sharpness.hessian_trace, samples=10)),
    Measure("active_units", "share of active units", sharpness.active_units),
)


def measure_model(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return every measure of a model in evaluation mode, and the curves behind some of them.

    The numbers are each measure's value and, as ``NAME_error``, its standard error where it has one; ``found``, the
    share of the first batch's l2 worst case, as a search of 100 steps with 3 restarts finds it, that the search of 20
    steps found; ``measured_loss``, the loss on the batches; and ``weight_norm``. The curves are ``ascent``, the largest
    rise of the loss within each number of steps, and ``landscape``, the loss at each place of ``LANDSCAPE_PLACES``.

    Args:
        model: The model; it comes back bit for bit.
        batches: Inputs and labels.
    """

    def measure(compute: Callable[..., sharpness.Result]) -> sharpness.Result:
        return compute(model, sharpness.cross_entropy, batches)

    results = {each.name: measure(each.compute) for each in MEASURES}
    longer = _LONG_SEARCH(model, sharpness.cross_entropy, batches[:1])
    line = measure(_LANDSCAPE)
    worst = results["worst_case"]
    assert isinstance(worst, sharpness.WorstCase) and isinstance(line, sharpness.Landscape)
    metrics = {name: result.value for name, result in results.items()}
    metrics |= {
        f"{name}_error": result.standard_error for name, result in results.items() if result.standard_error is not None
    }
    found = worst.per_batch[0] / longer.value if longer.value > 0 else 1.0
    metrics |= {"found": found, "measured_loss": worst.loss, "weight_norm": _norm(model)}
    curves = {
        "ascent": list(worst.curve),
        "landscape": [loss for loss in line.losses if isinstance(loss, float)],
    }
    return metrics, curves


def _norm(model: nn.Module) -> float:
    return math.sqrt(math.fsum(float(weight.detach().double().square().sum()) for weight in model.parameters()))
