"""What a callback measures, by name: the measures themselves, and the numbers in a record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from samopt.sharpness import Result, average_case, hessian_eigenvalues, per_layer, worst_case

__all__ = ["MEASURES", "Measure", "Measures", "named_measures", "per_layer_values"]

Measure = Callable[..., Result]
Measures = Mapping[str, Measure | Mapping[str, Any]] | Iterable[str | Measure]

MEASURES: dict[str, Measure] = {
    "worst_case": functools.partial(worst_case, rho=0.5, adaptive=True, steps=10),
    "average_case": functools.partial(average_case, rho=0.05, adaptive=True),
    "per_layer": functools.partial(per_layer, rho=0.5, adaptive=True, steps=3),
    "lambda_max": hessian_eigenvalues,
}
"""The measures that have a name of their own; the radii are ASAM's usual one, and 5% noise on each weight."""


def named_measures(measures: Measures) -> dict[str, Measure]:
    """Return measures by the names that they are logged under.

    Args:
        measures: Names in ``MEASURES`` and functions as in ``samopt.sharpness``; or a mapping, from names of one's own
            to functions, or from names in ``MEASURES`` to options that replace their own.

    Raises:
        TypeError: If one is neither a name nor a function.
        ValueError: If a name is unknown, there are two of a name, or there is none.
    """
    if isinstance(measures, str):
        raise TypeError(f"measures must be a list of names, got the string {measures!r}; write [{measures!r}]")
    named: dict[str, Measure] = {}
    pairs = measures.items() if isinstance(measures, Mapping) else ((None, measure) for measure in measures)
    for given, measure in pairs:
        name, function = _named(given, measure)
        if name in named:
            raise ValueError(f"two measures are called {name!r}; give a dict with a name for each")
        named[name] = function
    if not named:
        raise ValueError(f"measures is empty; name some of {', '.join(MEASURES)}, or leave it out for the default")
    return named


def per_layer_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the value of each layer of each per-layer measure, under ``sharpness/MEASURE/LAYER``.

    Args:
        record: An entry of a ``samopt.sharpness.SharpnessMonitor``'s history.
    """
    return {
        f"sharpness/{name}/{layer}": float(result["value"])
        for name, measured in record["measures"].items()
        for layer, result in measured.get("layers", {}).items()
    }


def _named(name: str | None, measure: Any) -> tuple[str, Measure]:
    if callable(measure):
        own: str = getattr(getattr(measure, "func", measure), "__name__", type(measure).__name__)
        return name or own, measure
    known = measure if name is None else name
    options = {} if name is None else measure
    if not isinstance(known, str) or not isinstance(options, Mapping):
        raise TypeError(
            f"a measure must be a name, or a function such as samopt.sharpness.worst_case, got {measure!r}; bind its "
            "arguments with functools.partial(worst_case, rho=0.1), or give {'worst_case': {'rho': 0.1}}"
        )
    if known not in MEASURES:
        raise ValueError(f"a measure must be one of {', '.join(MEASURES)}, or a function, got {known!r}")
    return known, functools.partial(MEASURES[known], **options)
