"""``optimizer``: what the optimizer's own part of a step costs, against the textbook loop and another package."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.environment import select_device
from benchmarks.errors import BenchmarkError
from benchmarks.registry import COMMANDS, Command
from benchmarks.results import INTERRUPTED
from benchmarks.updates.alone import ONE_PASS, measure_alone, name_at
from benchmarks.updates.cases import CASES, Case, growth
from benchmarks.updates.clock import CLOCKS
from benchmarks.updates.contenders import CONTENDERS, METRICS
from benchmarks.updates.measure import (
    Measurement,
    measure_steps,
    measure_updates,
    read_measurements,
    write_measurements,
)
from benchmarks.updates.report import markdown, plot

__all__ = ["OPTIMIZER"]

_QUICK = {
    "cases": [CASES["resnet18"]],
    "contenders": ["base", "textbook", "samopt-cpu"],
    "metrics": ["sam"],
    "rounds": 2,
    "step_rounds": 1,
    "batches": [],
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", type=_cases, help=f"comma-separated, of {', '.join(CASES)} (default: all that the device can hold)")
    add("--contenders", type=_contenders, help=f"comma-separated, of {', '.join(CONTENDERS)} (default: all)")
    add("--metrics", type=_metrics, default="sam,asam", help="comma-separated (default: %(default)s)")
    add("--rounds", type=arguments.positive_int, default=15, help="turns of each update (default: %(default)s)")
    add("--step-rounds", type=arguments.positive_int, default=7, help="of each whole step (default: %(default)s)")
    add(
        "--batches",
        type=_batches,
        default="1,4,16",
        help="sizes, in small batches, of one-pass steps (default: %(default)s)",
    )
    add("--device", default="cpu", help="as torch names it (default: %(default)s)")
    add("--threads", type=arguments.positive_int, default=1, help="CPU threads (default: %(default)s)")
    add("--clock", default="wall", help="wall, or cpu where other programs share the machine (default: %(default)s)")
    add("--output", type=Path, default=Path("results/optimizer"), help="folder, continued (default: %(default)s)")
    add("--quick", action="store_true", help="one case, three contenders, two rounds: does it run?")


def _run(options: argparse.Namespace) -> int:
    if options.clock not in CLOCKS:
        raise BenchmarkError(f"--clock must be one of {', '.join(CLOCKS)}, got {options.clock!r}")
    torch.set_num_threads(options.threads)
    if options.quick:
        vars(options).update(_QUICK)
    path = options.output / "updates.jsonl"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if options.quick:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--output {options.output} cannot be written: {error}; give another folder") from error
    console = Console()
    notes: list[str] = []
    try:
        with console.status("measuring"):
            for part in _measure(options, read_measurements(path), notes):
                write_measurements(path, part)
                first = part[0]
                text = f"{first.kind}: {first.case}, {first.metric}: {len(part)} contenders"
                console.print(text, markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last finished case")
        return INTERRUPTED
    measurements = read_measurements(path)
    table = markdown(measurements, list(dict.fromkeys(notes)))
    (options.output / "table.md").write_text(table, encoding="utf-8")
    plot(measurements, options.output / "updates.png")
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {path}, table.md and updates.png", highlight=False, soft_wrap=True)
    return 0


def _measure(options: argparse.Namespace, known: list[Measurement], notes: list[str]) -> Iterator[list[Measurement]]:
    """Measure every group of rows that is not known yet."""
    device = select_device(options.device)
    done = {(one.kind, one.case, one.metric) for one in known}
    shared = {
        "names": options.contenders or list(CONTENDERS),
        "device": device,
        "clock": options.clock,
        "note": notes.append,
    }
    cases = options.cases or [case for case in CASES.values() if device.type == "cuda" or not case.needs_gpu]
    kinds = {"update": cases} | growth(options.quick)
    for metric in options.metrics:
        for kind, members in kinds.items():
            for case in members:
                if (kind, case.name, metric) not in done and (kind == "update" or metric == "sam"):
                    yield measure_updates(kind, case, metric, rounds=options.rounds, **shared)
        for case in cases:
            if case.batch is not None and ("step", case.name, metric) not in done:
                yield measure_steps(case, metric, rounds=options.step_rounds, **shared)
        one_pass = [name for name, backend in ONE_PASS.items() if backend == "auto" or device.type == "cpu"]
        how = {"rounds": options.step_rounds, "device": device, "clock": options.clock}
        for times in options.batches:
            for case in cases:
                if case.batch is not None and ("batch", name_at(case.name, times), metric) not in done:
                    yield measure_alone(case, metric, times, one_pass, **how)


def _cases(text: str) -> list[Case]:
    return [CASES[name] for name in arguments.names("a case", text, CASES, "resnet18,tiny500")]


def _contenders(text: str) -> list[str]:
    names = arguments.names("a contender", text, CONTENDERS, "base,textbook,samopt-cpu")
    return names if "base" in names else ["base", *names]


def _metrics(text: str) -> list[str]:
    return arguments.names("a metric", text, dict.fromkeys(METRICS), "sam,asam")


def _batches(text: str) -> list[int]:
    return [arguments.positive_int(size) for size in text.split(",")]


OPTIMIZER = COMMANDS.add(
    Command(
        "optimizer",
        "milliseconds and memory of the update alone and of whole steps: textbook, another package, every backend",
        _add_arguments,
        _run,
    )
)
