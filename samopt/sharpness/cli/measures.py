"""The measures that a command can ask for, with their arguments as options."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from samopt.sharpness._measuring.losses import LossFn
from samopt.sharpness._measuring.measured_model import accuracy_for
from samopt.sharpness._measuring.results import Result
from samopt.sharpness.activations import active_units
from samopt.sharpness.cli.data import inputs_and_labels
from samopt.sharpness.cli.errors import CommandError, one_line
from samopt.sharpness.curvature.eigenvalues import gauss_newton_eigenvalues, hessian_eigenvalues
from samopt.sharpness.curvature.preconditioned import preconditioned_eigenvalues
from samopt.sharpness.curvature.spectral_density import spectral_density
from samopt.sharpness.curvature.trace import hessian_trace
from samopt.sharpness.dimension import intrinsic_dimension
from samopt.sharpness.labels import label_sharpness
from samopt.sharpness.nearby.average_case import average_case
from samopt.sharpness.nearby.per_layer import per_layer
from samopt.sharpness.nearby.worst_case import worst_case
from samopt.sharpness.paths.interpolation import interpolate
from samopt.sharpness.paths.landscape import landscape
from samopt.sharpness.robustness.adversarial import fgsm
from samopt.sharpness.robustness.forgetting import forgetting
from samopt.sharpness.robustness.quantization import quantization
from samopt.sharpness.robustness.weight_noise import weight_noise

__all__ = [
    "DATA_MEASURES",
    "MEASURES",
    "PAIR_MEASURES",
    "Request",
    "Surroundings",
    "add_measures",
    "run",
    "to_requests",
]

MEASURES: dict[str, Callable[..., Result]] = {
    function.__name__: function
    for function in (
        worst_case,
        average_case,
        hessian_eigenvalues,
        gauss_newton_eigenvalues,
        preconditioned_eigenvalues,
        hessian_trace,
        spectral_density,
        per_layer,
        landscape,
        interpolate,
        active_units,
        weight_noise,
        quantization,
        forgetting,
        fgsm,
        label_sharpness,
        intrinsic_dimension,
    )
}
"""By name."""

DATA_MEASURES = ("label_sharpness", "intrinsic_dimension")
"""Those of the data alone."""
PAIR_MEASURES = ("interpolate",)
"""Those of two models."""

_WITH_ACCURACY = ("interpolate", "quantization", "forgetting", "fgsm")
_GIVEN = {"model", "loss_fn", "batches", "progress", "mode", "start", "directions", "accuracy_fn"}
_GIVEN_TO = {
    "preconditioned_eigenvalues": {"optimizer"},
    "interpolate": {"end"},
    "forgetting": {"elsewhere", "optimizer"},
    "label_sharpness": {"inputs", "labels"},
    "intrinsic_dimension": {"points"},
}


@dataclass(frozen=True)
class Request:
    """A measure with the arguments to call it with.

    Attributes:
        label: Its name in the results.
        name: The measure's.
        options: Keyword arguments.
    """

    label: str
    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Surroundings:
    """What a measure may need besides its options.

    Attributes:
        models: The models, by name.
        loss_fn: The loss.
        batches: The batches.
        mode: "eval", "train" or "keep".
        elsewhere: Batches of other data, or None.
        make_optimizer: Makes the optimizer that a model was trained with, or None.
    """

    models: dict[str, nn.Module]
    loss_fn: LossFn
    batches: list[Any]
    mode: str
    elsewhere: list[Any] | None
    make_optimizer: Callable[[nn.Module], Any] | None


def per_layer_options(
    measure: str = "worst_case", layers: list[str] | None = None, options: dict[str, Any] | None = None
) -> None:
    """Options of ``per_layer``.

    Args:
        measure: Name of a measure that takes ``parameters``.
        layers: Module names, parameter names or patterns; by default every module that holds trainable parameters.
        options: The measure's own.
    """


def add_measures(parser: Any) -> None:
    """Add every measure's arguments as options, ``--worst_case.rho`` and so on.

    Args:
        parser: Of a subcommand.
    """
    for name in MEASURES:
        _add(parser, name, name)


def to_requests(parser_class: Any, chosen: Sequence[Any], groups: Any) -> list[Request]:
    """Return what was asked for.

    Args:
        parser_class: jsonargparse's ArgumentParser.
        chosen: Names of measures, and mappings from a name to options of its own.
        groups: The parsed options of every measure.

    Raises:
        CommandError: If a measure or an option is unknown, or two have the same label.
    """
    requests: dict[str, Request] = {}
    for item in chosen:
        name, changes = (item, {}) if isinstance(item, str) else _single(item)
        _check_name("measure", name, MEASURES)
        options = groups[name].as_dict()
        for key in changes:
            _check_name(f"argument of {name}", key, options)
        if changes:
            options = _checked(parser_class, name, options | changes)
        label = " ".join([name, *(f"{key}={value}" for key, value in changes.items())])
        if label in requests:
            raise CommandError(f"{label!r} is asked for twice")
        requests[label] = Request(label, name, options)
    if not requests:
        raise CommandError(f"--measures names no measure; there are {', '.join(MEASURES)}")
    return list(requests.values())


def run(request: Request, names: Sequence[str], around: Surroundings) -> Result:
    """Return what a measure measures.

    Args:
        request: The measure.
        names: Of the models: one, or for a measure of a pair two.
        around: Everything else.

    Raises:
        CommandError: If something that it needs was not given.
    """
    model = around.models[names[0]]
    function, options = MEASURES[request.name], dict(request.options)
    if request.name in DATA_MEASURES:
        inputs, labels = inputs_and_labels(model, around.batches)
        return function(inputs, labels, **options) if request.name == "label_sharpness" else function(inputs, **options)
    extra: list[Any] = []
    if request.name == "per_layer":
        inner = options["measure"]
        _check_name("measure", inner, MEASURES)
        options = {"measure": MEASURES[inner], "layers": options["layers"], **(options["options"] or {})}
    if request.name in PAIR_MEASURES:
        extra = [around.models[names[1]]]
    if request.name == "forgetting":
        if around.elsewhere is None:
            raise CommandError("forgetting needs other data to train on; name it with --elsewhere module:function")
        extra = [around.elsewhere]
    if request.name == "preconditioned_eigenvalues":
        if around.make_optimizer is None:
            raise CommandError(
                "preconditioned_eigenvalues needs the optimizer; name it with --optimizer SGD --optimizer_args.lr 0.1, "
                "and give the state of Adam and its like with --optimizer_state FILE"
            )
        extra = [around.make_optimizer(model)]
    if request.name in _WITH_ACCURACY:
        options["accuracy_fn"] = accuracy_for(model, around.loss_fn, around.batches[0])
    return function(model, around.loss_fn, around.batches, *extra, mode=around.mode, **options)


def _add(parser: Any, name: str, group: str | None) -> None:
    function: Any = per_layer_options if name == "per_layer" else MEASURES[name]
    parser.add_function_arguments(function, group, skip=_GIVEN | _GIVEN_TO.get(name, set()), fail_untyped=False)


def _checked(parser_class: Any, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, checked against the measure's signature."""
    parser = parser_class(exit_on_error=False)
    _add(parser, name, None)
    try:
        checked: dict[str, Any] = parser.parse_object(dict(options)).as_dict()
    except Exception as error:  # jsonargparse's own errors are of several classes
        raise CommandError(f"{name}: {one_line(str(error))}") from error
    return checked


def _single(item: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(item, Mapping) and len(item) == 1:
        name, changes = next(iter(item.items()))
        if changes is None or isinstance(changes, Mapping):
            return str(name), changes or {}
    raise CommandError(f"a measure is a name, or a name with options as in {{worst_case: {{rho: 0.1}}}}, got {item!r}")


def _check_name(kind: str, name: str, known: Any) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CommandError(f"unknown {kind} {name!r}; {hint}Known: {', '.join(known)}")
