"""What a person asks to measure: a measure's name, perhaps with some of its arguments."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from samopt.sharpness._measuring.results import Result
from samopt.sharpness.activations import active_units
from samopt.sharpness.cli.loading import CommandError
from samopt.sharpness.curvature.eigenvalues import gauss_newton_eigenvalues, hessian_eigenvalues
from samopt.sharpness.curvature.spectral_density import spectral_density
from samopt.sharpness.curvature.trace import hessian_trace
from samopt.sharpness.nearby.average_case import average_case
from samopt.sharpness.nearby.per_layer import per_layer
from samopt.sharpness.nearby.worst_case import worst_case
from samopt.sharpness.paths.interpolation import interpolate
from samopt.sharpness.paths.landscape import landscape

__all__ = ["MEASURES", "Request", "parse_request"]

MEASURES: dict[str, Callable[..., Result]] = {
    "worst_case": worst_case,
    "average_case": average_case,
    "hessian_eigenvalues": hessian_eigenvalues,
    "gauss_newton_eigenvalues": gauss_newton_eigenvalues,
    "hessian_trace": hessian_trace,
    "spectral_density": spectral_density,
    "landscape": landscape,
    "interpolate": interpolate,
    "active_units": active_units,
    "per_layer": per_layer,
}
"""Those that a command line can ask for."""

_NOT_TEXT = {"progress", "directions", "accuracy_fn", "layers", "extent", "end", "start", "optimizer"}
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Request:
    """A measure with the arguments to call it with.

    Attributes:
        label: What the person typed; its name in the results.
        name: The measure's.
        options: Keyword arguments.
    """

    label: str
    name: str
    options: Mapping[str, Any]


def parse_request(text: str) -> Request:
    """Return the request that ``NAME`` or ``NAME:ARGUMENT=VALUE:...`` describes.

    ``per_layer`` takes ``measure=NAME`` and that measure's arguments.

    Args:
        text: What a person typed.

    Raises:
        CommandError: If a name is unknown, or a value is missing.
    """
    name, *changes = text.split(":")
    _choose("measure", name, MEASURES)
    options: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise CommandError(f"{change!r} in {text!r} is no argument; write {name}:{change}=VALUE")
        options[key] = _value(value)
    function = MEASURES[name]
    if name == "per_layer":
        inner = str(options.get("measure", "worst_case"))
        _choose("measure", inner, MEASURES)
        function = options["measure"] = MEASURES[inner]
    known = [key for key in inspect.signature(function).parameters if key not in _NOT_TEXT][3:]
    for key in options:
        if not (name == "per_layer" and key == "measure"):
            _choose(f"argument of {name}", key, known)
    return Request(text, name, options)


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _choose(kind: str, name: str, known: Any) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CommandError(f"unknown {kind} {name!r}; {hint}Known: {', '.join(known)}")
