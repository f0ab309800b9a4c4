"""The command line: measures a saved model, and writes JSON and figures."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import samopt
from samopt.sharpness._measuring.losses import LossFn, accuracy, cross_entropy, hf_loss
from samopt.sharpness._measuring.results import Result, to_json
from samopt.sharpness.cli.loading import CommandError, load_weights, named_function, read_state_dict
from samopt.sharpness.cli.requests import MEASURES, Request, parse_request

__all__ = ["main"]

_LOSSES: dict[str, LossFn] = {"cross_entropy": cross_entropy, "hf": hf_loss}
_USAGE_ERROR, _INTERRUPTED = 2, 130

_EPILOG = """\
measures (arguments are those of samopt.sharpness.NAME, joined with colons):
  worst_case:rho=0.1:adaptive=true:norm=linf:steps=20   average_case:rho=0.05:samples=20
  hessian_eigenvalues:k=5   gauss_newton_eigenvalues   hessian_trace:samples=50   spectral_density
  landscape:dimensions=2    active_units               per_layer:measure=worst_case:rho=0.1
  interpolate:points=21 (to the weights given with --end; with accuracy)

example, in a folder with my_project.py:
  python -m samopt.sharpness --model my_project:build_model --weights model.safetensors \\
      --data my_project:training_batches --measure worst_case:rho=0.1 --measure hessian_eigenvalues:k=3
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of the command, once it has run: 0, 2 for bad input, 130 after an interrupt.

    Args:
        arguments: Those of the command line; None for the process's.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; what had been measured is in the output folder", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m samopt.sharpness",
        description="Measure how sharp the loss of a saved model is; write results.json and a figure for each measure.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="MODULE:FUNCTION", help="a function without arguments that builds the model")
    add("--weights", type=Path, metavar="FILE", help="safetensors, or a state dict saved with torch.save")
    add("--end", type=Path, metavar="FILE", help="second weights, for interpolate")
    add("--key", metavar="NAME", help="where in the file the state dict is, as in state_dict")
    add("--data", required=True, metavar="MODULE:FUNCTION", help="a function without arguments that returns batches")
    add("--batches", type=int, default=8, metavar="N", help="use the first N batches (default: %(default)s)")
    add(
        "--loss",
        default="cross_entropy",
        metavar="LOSS",
        help="cross_entropy for (inputs, labels), hf for a Hugging Face model's batches, or MODULE:FUNCTION called as "
        "loss(model, batch) (default: %(default)s)",
    )
    add(
        "--measure",
        action="append",
        metavar="NAME[:ARG=VALUE...]",
        help="may be repeated (default: worst_case and hessian_eigenvalues)",
    )
    add("--mode", default="eval", choices=["eval", "train", "keep"], help="default: %(default)s")
    add("--device", default="cpu", help="as torch names it (default: %(default)s)")
    add("--output", type=Path, default=Path("results/sharpness"), help="folder (default: %(default)s)")
    add("--no-plots", action="store_true", help="write results.json only")
    return parser


def _run(options: argparse.Namespace) -> int:
    requests = [parse_request(text) for text in options.measure or ["worst_case", "hessian_eigenvalues"]]
    if options.batches < 1:
        raise CommandError(f"--batches must be at least 1, got {options.batches}")
    if any(request.name == "interpolate" for request in requests) and options.end is None:
        raise CommandError("interpolate needs the weights to go to; give them with --end FILE")
    loss_fn = _LOSSES.get(options.loss) or named_function("--loss", options.loss)
    model = _model(options)
    batches = _batches(options)
    end = None if options.end is None else read_state_dict(options.end, options.key)
    report: dict[str, Any] = {
        "model": options.model,
        "weights": None if options.weights is None else options.weights.name,
        "data": options.data,
        "batches": len(batches),
        "environment": {"samopt": samopt.__version__, "torch": torch.__version__, "device": options.device},
        "results": {},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for number, request in enumerate(requests):
        start = time.perf_counter()
        result = _measure(request, model, loss_fn, batches, end, options)
        seconds = time.perf_counter() - start
        if number == 0:
            print(f"{'measure':40} {'value':>12} {'error':>10} {'gradients':>10} {'seconds':>8}")
        error = "-" if result.standard_error is None else f"{result.standard_error:.2g}"
        print(f"{request.label:40} {result.value:12.6g} {error:>10} {result.cost:10.1f} {seconds:8.1f}")
        report["results"][request.label] = {**result.to_dict(), "seconds": seconds}
        (options.output / "results.json").write_text(to_json(report, indent=1) + "\n", encoding="utf-8")
        if not options.no_plots:
            result.plot().savefig(options.output / f"{_file_name(request.label)}.png", dpi=110)
    print(f"written to {options.output}")
    return 0


def _model(options: argparse.Namespace) -> nn.Module:
    model = named_function("--model", options.model)()
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {options.model} must return a torch.nn.Module, got {type(model).__name__}")
    if options.weights is not None:
        load_weights(model, read_state_dict(options.weights, options.key), str(options.weights))
    try:
        return model.to(options.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise CommandError(f"--device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _batches(options: argparse.Namespace) -> list[Any]:
    produced = named_function("--data", options.data)()
    try:
        return list(itertools.islice(produced, options.batches))
    except TypeError as error:
        raise CommandError(
            f"--data {options.data} must return an iterable of batches, got {type(produced).__name__}"
        ) from error


def _measure(
    request: Request, model: nn.Module, loss_fn: LossFn, batches: list[Any], end: Any, options: argparse.Namespace
) -> Result:
    keywords: dict[str, Any] = {"mode": options.mode, **request.options}
    if request.name == "interpolate":
        keywords |= {"end": end, "accuracy_fn": accuracy}
    try:
        return MEASURES[request.name](model, loss_fn, batches, **keywords)
    except (ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        if not _is_explained(error):
            raise
        raise CommandError(f"{request.label}: {error}") from error


def _is_explained(error: Exception) -> bool:
    """Return whether this package raised it, so that the message is for the person; others need their traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("samopt.")


def _file_name(label: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in label)
