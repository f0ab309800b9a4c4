"""Measures by name, with the settings that comparisons, monitors and callbacks share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from samopt.sharpness._measuring.results import Result
from samopt.sharpness.curvature.eigenvalues import WarmStart, hessian_eigenvalues
from samopt.sharpness.curvature.trace import hessian_trace
from samopt.sharpness.nearby.average_case import average_case
from samopt.sharpness.nearby.per_layer import per_layer
from samopt.sharpness.nearby.worst_case import worst_case
from samopt.sharpness.robustness.quantization import quantization
from samopt.sharpness.robustness.weight_noise import weight_noise

__all__ = ["DEFAULT", "PRESETS", "Measure", "Measures", "named_measures"]

Measure = Callable[..., Result]
"""``measure(model, loss_fn, batches, progress=...)``."""

# Mappings come before functions: jsonargparse saves a value by the first type that takes it, and cannot save functions.
Measures = Mapping[str, Mapping[str, Any] | Measure] | Iterable[str | Measure]
"""Names of presets and functions; or a mapping, from own names to functions, or from presets to other options."""

PRESETS: dict[str, tuple[Measure, dict[str, Any]]] = {
    "worst_case": (worst_case, {"rho": 0.5, "adaptive": True, "steps": 10}),
    "worst_case_plain": (worst_case, {"rho": 0.05, "steps": 10}),
    "one_step": (worst_case, {"rho": 0.05, "steps": 1}),
    "average_case": (average_case, {"rho": 0.05, "adaptive": True}),
    "per_layer": (per_layer, {"rho": 0.5, "adaptive": True, "steps": 3}),
    "lambda_max": (hessian_eigenvalues, {"tolerance": 1e-2}),
    "trace": (hessian_trace, {"samples": 10}),
    "quantization": (quantization, {}),
    "weight_noise": (weight_noise, {}),
}
"""The measures that have a name of their own. The adaptive radii are ASAM's usual one, and noise of 5% on each weight;
"one_step" is what SAM itself measures."""

DEFAULT = ("worst_case", "average_case")
"""What monitors and callbacks measure."""


def named_measures(measures: Measures, *, warm: bool = False) -> dict[str, Measure]:
    """Return measures by the names that they are logged under.

    Args:
        measures: Names in ``PRESETS`` and functions as in ``samopt.sharpness``; or a mapping, from names of one's own
            to functions, or from names in ``PRESETS`` to options that replace their own.
        warm: Let an eigenvalue start from the last one's vector, for a model that is measured again and again.

    Raises:
        TypeError: If one is neither a name nor a function.
        ValueError: If a name is unknown, there are two of a name, or there is none.
    """
    if isinstance(measures, str):
        raise TypeError(f"measures must be a list of names, got the string {measures!r}; write [{measures!r}]")
    named: dict[str, Measure] = {}
    pairs = measures.items() if isinstance(measures, Mapping) else ((None, measure) for measure in measures)
    for given, measure in pairs:
        name, function = _named(given, measure, warm)
        if name in named:
            raise ValueError(f"two measures are called {name!r}; give a dict with a name for each")
        named[name] = function
    if not named:
        raise ValueError(f"measures is empty; name some of {', '.join(PRESETS)}, or leave it out for the default")
    return named


def _named(name: str | None, measure: Any, warm: bool) -> tuple[str, Measure]:
    if callable(measure):
        own: str = getattr(getattr(measure, "func", measure), "__name__", type(measure).__name__)
        return name or own, measure
    known = measure if name is None else name
    options = {} if name is None else measure
    if options is None:
        options = {}  # as YAML has it: "lambda_max:" with nothing after it
    if not isinstance(known, str) or not isinstance(options, Mapping):
        raise TypeError(
            f"a measure must be a name, or a function such as samopt.sharpness.worst_case, got {measure!r}; bind its "
            "arguments with functools.partial(worst_case, rho=0.1), or give {'worst_case': {'rho': 0.1}}"
        )
    if known not in PRESETS:
        raise ValueError(f"a measure must be one of {', '.join(PRESETS)}, or a function, got {known!r}")
    function, defaults = PRESETS[known]
    start = {"start": WarmStart()} if warm and function is hessian_eigenvalues else {}
    return known, functools.partial(function, **{**defaults, **start, **options})
