"""The command line: measures saved models, compares them, and looks for a radius."""

from __future__ import annotations

import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samopt.sharpness._measuring.losses import LossFn
from samopt.sharpness._measuring.measured_model import accuracy_for
from samopt.sharpness._measuring.optional_packages import require
from samopt.sharpness._measuring.results import Result, to_json
from samopt.sharpness.cli.data import load_batches, load_loss
from samopt.sharpness.cli.errors import CommandError, explained, one_line
from samopt.sharpness.cli.measures import DATA_MEASURES, PAIR_MEASURES, Surroundings, add_measures, run, to_requests
from samopt.sharpness.cli.models import load_models
from samopt.sharpness.cli.optimizers import optimizer_maker
from samopt.sharpness.cli.writing import file_name, make_folder, write, write_figure
from samopt.sharpness.comparison.compare import COMPARED, Comparison, compare
from samopt.sharpness.presets import PRESETS
from samopt.sharpness.radius.find_rho import RhoSearch, find_rho

__all__ = ["main"]

_USAGE_ERROR, _INTERRUPTED = 2, 130
_EXAMPLES = """
examples, in a folder with my_project.py:
  python -m samopt.sharpness compare --model my_project:build_model --weights sgd.pt sam.pt --data my_project:batches
  python -m samopt.sharpness measure --model my_project:build_model --weights model.safetensors \\
      --data my_project:batches --measures worst_case hessian_eigenvalues --worst_case.rho 0.1
  python -m samopt.sharpness find_rho --model my_project:build_model --as_built true --data my_project:batches \\
      --batches 100 --optimizer SGD --optimizer_args '{lr: 0.1, momentum: 0.9}'
  python -m samopt.sharpness measure --weights a_folder_that_transformers_saved --data my_project:batches
  python -m samopt.sharpness measure ... --print_config > run.yaml; python -m samopt.sharpness measure --config run.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of the command, once it has run: 0, 2 for bad input, 130 after an interrupt.

    Args:
        arguments: Those of the command line; None for the process's.
    """
    try:
        jsonargparse = require("jsonargparse", "the command line")
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE_ERROR
    try:
        options = _parser(jsonargparse).parse_args(arguments)
        _COMMANDS[options.subcommand](jsonargparse, options[options.subcommand])
        return 0
    except (CommandError, jsonargparse.ArgumentError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return _USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; what had been measured is in the output folder", file=sys.stderr)
        return _INTERRUPTED


@functools.cache
def _parser(jsonargparse: Any) -> Any:
    parser = jsonargparse.ArgumentParser(
        prog="python -m samopt.sharpness",
        description="Measure how sharp the loss of saved models is.",
        epilog=_EXAMPLES,
        formatter_class=_formatter(jsonargparse),
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True)
    for name, (summary, add) in {
        "measure": ("Measure models: results.json, and a figure for each measure.", _add_measure),
        "find_rho": ("Find the radius to train with: find_rho.json and find_rho.png.", _add_find_rho),
        "compare": ("Compare models: comparison.json, comparison.txt and comparison.png.", _add_compare),
    }.items():
        command = jsonargparse.ArgumentParser(description=summary, exit_on_error=False, allow_abbrev=False)
        command.add_argument("--config", action="config", help="a YAML file with any of the options")
        _add_common(command)
        add(command)
        commands.add_subcommand(name, command, help=summary)
    return parser


def _formatter(jsonargparse: Any) -> Any:
    import argparse

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):  # type: ignore[misc]
        """Keeps the lines of the examples."""

    return Formatter


def _add_common(parser: Any) -> None:
    add = parser.add_argument
    add("--model", type=str | None, help="module:Class, module:function, or a folder that transformers saved")
    add(
        "--model_args",
        type=dict[str, Any],
        default={},
        help="keyword arguments of the class or function, or of from_pretrained for a folder: {dtype: float32}",
    )
    add(
        "--weights",
        nargs="*",
        type=str,
        default=[],
        help="one for each model: safetensors, torch.save's, Lightning's checkpoints, folders that transformers saved",
    )
    add("--as_built", type=bool, default=False, help="measure the model as it is built, without loading weights")
    add("--names", nargs="+", type=str, default=None, help="of the models; by default the names of the files")
    add("--key", type=str | None, help="where in the files the weights are, as in state_dict.teacher; else looked for")
    add("--data", type=str, required=True, help="module:function that returns batches, or module:name of batches")
    add("--data_args", type=dict[str, Any], default={}, help="keyword arguments of that function")
    add("--batches", type=int, default=8, help="use the first so many batches")
    add(
        "--loss",
        type=str,
        default="auto",
        help="auto (cross entropy of (inputs, labels); the model's own for a transformers batch), cross_entropy, hf, "
        "module:function called as loss(model, batch), or a torch loss such as torch.nn:MSELoss",
    )
    add("--device", type=str, default="cpu", help="as torch names it")
    add("--output", type=str, default="results/sharpness", help="folder for the results")
    add("--plots", type=bool, default=True, help="draw figures")


def _add_state(parser: Any) -> None:
    parser.add_argument("--elsewhere", type=str | None, help="module:function of other data, for forgetting")
    parser.add_argument("--mode", type=str, default="eval", help="eval, train or keep")


def _add_measure(parser: Any) -> None:
    _add_state(parser)
    parser.add_argument(
        "--measures",
        nargs="+",
        type=str | dict[str, Any],
        default=["worst_case", "hessian_eigenvalues"],
        help="names, or names with options of their own: '{worst_case: {rho: 0.1}}'; interpolate needs two --weights",
    )
    parser.add_argument("--optimizer", type=str | None, help="torch.optim's name, or module:Class")
    parser.add_argument("--optimizer_args", type=dict[str, Any], default={}, help="its arguments, as in {lr: 0.1}")
    parser.add_argument("--optimizer_state", type=str | None, help="a file with its state dict")
    add_measures(parser)


def _add_find_rho(parser: Any) -> None:
    parser.add_argument("--optimizer", type=str, required=True, help="the base: torch.optim's name, or module:Class")
    parser.add_argument("--optimizer_args", type=dict[str, Any], default={}, help="its arguments, as in {lr: 0.1}")
    parser.add_argument("--optimizer_state", type=str | None, help="a file with its state dict")
    parser.add_argument("--validation", type=str | None, help="module:function of batches to compare on")
    skip = {"model", "loss_fn", "batches", "optimizer", "validation", "accuracy_fn", "progress"}
    parser.add_function_arguments(find_rho, skip=skip, fail_untyped=False)


def _add_compare(parser: Any) -> None:
    _add_state(parser)
    parser.add_argument(
        "--measures",
        nargs="+",
        type=str | dict[str, Any],
        default=list(COMPARED),
        help=f"presets ({', '.join(PRESETS)}), or presets with other options: '{{worst_case: {{rho: 0.1}}}}'",
    )


class _Loaded:
    """What every command loads first."""

    def __init__(self, options: Any, *, at_least: int = 1) -> None:
        if len(options.weights) < at_least and at_least > 1:
            raise CommandError(f"a comparison needs at least {at_least} --weights, got {len(options.weights)}")
        self.output = Path(options.output)
        make_folder(self.output)
        self.batches = load_batches("--data", options.data, options.data_args, options.batches)
        other = options.get("elsewhere")
        self.elsewhere = None if other is None else load_batches("--elsewhere", other, {}, options.batches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.models = load_models(
                options.model,
                options.model_args,
                options.weights,
                names=options.names,
                key=options.key,
                as_built=options.as_built,
                device=options.device,
            )
        self.first: nn.Module = next(iter(self.models.values()))
        self.loss_fn: LossFn = load_loss(options.loss, self.first, self.batches[0])
        self.about: dict[str, Any] = {
            "model": options.model,
            "weights": list(options.weights),
            "data": options.data,
            "batches": len(self.batches),
            "environment": {
                "samopt": sys.modules["samopt"].__version__,
                "torch": torch.__version__,
                "device": options.device,
            },
        }


def _measure(jsonargparse: Any, options: Any) -> None:
    requests = to_requests(jsonargparse.ArgumentParser, options.measures, options)
    if any(request.name in PAIR_MEASURES for request in requests) and len(options.weights) != 2:
        raise CommandError("interpolate goes from one model to another; give two --weights")
    loaded = _Loaded(options)
    around = Surroundings(
        loaded.models,
        loaded.loss_fn,
        loaded.batches,
        options.mode,
        loaded.elsewhere,
        optimizer_maker(options.optimizer, options.optimizer_args, options.optimizer_state),
    )
    report: dict[str, Any] = {**loaded.about, "results": {}}
    width = max(len(request.label) for request in requests)
    print(f"{'measure':{width}} {'model':20} {'value':>12} {'error':>10} {'gradients':>10} {'seconds':>8}")
    for request in requests:
        for name, of in _targets(request.name, list(loaded.models)):
            start = time.perf_counter()
            with explained(request.label):
                result = run(request, of, around)
            seconds = time.perf_counter() - start
            error = "-" if result.standard_error is None else f"{result.standard_error:.2g}"
            row = f"{request.label:{width}} {name:20} {result.value:12.6g} {error:>10}"
            print(f"{row} {result.cost:10.1f} {seconds:8.1f}")
            report["results"].setdefault(name, {})[request.label] = {**result.to_dict(), "seconds": seconds}
            _write_report(loaded.output / "results.json", report)
            if options.plots:
                _draw(loaded.output, request.label, name, result, alone=len(loaded.models) == 1)
    print(f"written to {loaded.output}")


def _targets(measure: str, names: list[str]) -> list[tuple[str, list[str]]]:
    """Return what a measure is of: each model, the data, or the pair of models."""
    if measure in DATA_MEASURES:
        return [("data", names[:1])]
    if measure in PAIR_MEASURES:
        return [(f"{names[0]} to {names[1]}", names)]
    return [(name, [name]) for name in names]


def _draw(folder: Path, label: str, name: str, result: Result, *, alone: bool) -> None:
    with explained("--plots true"):
        figure = result.plot(f"{result.measure.replace('_', ' ')}: {name}")
    write_figure(folder / f"{file_name(label if alone else f'{name} {label}')}.png", figure)


def _compare(jsonargparse: Any, options: Any) -> None:
    loaded = _Loaded(options, at_least=2)
    with explained("compare"):
        comparison = compare(
            loaded.models,
            loaded.loss_fn,
            loaded.batches,
            measures=_presets(options.measures),
            elsewhere=loaded.elsewhere,
            accuracy_fn=accuracy_for(loaded.first, loaded.loss_fn, loaded.batches[0]),
            mode=options.mode,
        )
    print(comparison)
    write(loaded.output / "comparison.txt", f"{comparison}\n".encode())
    _write(loaded, "comparison", comparison, plots=options.plots)


def _find_rho(jsonargparse: Any, options: Any) -> None:
    make = optimizer_maker(options.optimizer, options.optimizer_args, options.optimizer_state)
    loaded = _Loaded(options)
    if len(loaded.models) != 1 or make is None:
        raise CommandError(f"find_rho starts from one model, got {len(loaded.models)} --weights")
    held_out = options.validation
    validation = None if held_out is None else load_batches("--validation", held_out, {}, options.batches)
    names = ("radii", "variant", "steps", "folds", "seed")
    with explained("find_rho"):
        search = find_rho(
            loaded.first,
            loaded.loss_fn,
            loaded.batches,
            optimizer=make(loaded.first),
            validation=validation,
            **{name: options[name] for name in names},
        )
    for radius, gain, error in zip(search.radii, search.gains, search.errors, strict=True):
        found = f"{gain:+.4f} ± {error:.4f}" if math.isfinite(gain) else "none: the loss was not finite"
        print(f"rho={radius:<8g} gain in held-out {search.score} {found}")
    print(search.advice)
    _write(loaded, "find_rho", search, plots=options.plots)


def _write(loaded: _Loaded, name: str, found: Comparison | RhoSearch, *, plots: bool) -> None:
    _write_report(loaded.output / f"{name}.json", {**loaded.about, **found.to_dict()})
    if plots:
        with explained("--plots true"):
            figure = found.plot()
        write_figure(loaded.output / f"{name}.png", figure)
    print(f"written to {loaded.output}")


def _write_report(path: Path, report: Any) -> None:
    write(path, (to_json(report, indent=1) + "\n").encode())


def _presets(chosen: Sequence[Any]) -> Any:
    """Return the measures of a comparison: names and mappings as one mapping."""
    merged: dict[str, Any] = {}
    for item in chosen:
        for name, options in ({item: {}} if isinstance(item, str) else item).items():
            if name in merged:
                raise CommandError(f"{name!r} is asked for twice")
            merged[name] = options
    return merged


_COMMANDS: dict[str, Callable[[Any, Any], None]] = {"measure": _measure, "compare": _compare, "find_rho": _find_rho}
