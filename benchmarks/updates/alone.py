"""Whole steps in one pass against the base's, each in a process of its own as a user's run is, in turns."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from multiprocessing.connection import Connection
from types import TracebackType

import torch
from torch.optim import AdamW, Optimizer

import samopt
from benchmarks.errors import BenchmarkError
from benchmarks.updates.cases import CASES, Case
from benchmarks.updates.clock import seconds
from benchmarks.updates.contenders import OPTIONS, RHO
from benchmarks.updates.measure import Measurement, in_turns, measurement

__all__ = ["ONE_PASS", "measure_alone", "name_at", "parse_name"]

ONE_PASS = {"samopt-one-pass": "auto"}
"""The one-pass form on its backends, by name."""

_WARM_UP = 2  # steps before the round that is not counted: the first has no momentum, and memory is handed out anew
_SETS = 2  # of processes, one after the other: where the system puts a process's memory is worth a few percent
_TIMES = " x "


def name_at(case: str, times: int) -> str:
    """Return the name that a case has in measurements at some number of small batches.

    Args:
        case: The case's name.
        times: How many small batches' worth of examples.
    """
    return f"{case}{_TIMES}{times}"


def parse_name(name: str) -> tuple[str, int]:
    """Return the case's name and the number of small batches that ``name_at`` was given.

    Args:
        name: What it returned.
    """
    case, _, times = name.partition(_TIMES)
    return case, int(times)


def measure_alone(
    case: Case, metric: str, times: int, names: Sequence[str], *, rounds: int, device: torch.device, clock: str
) -> list[Measurement]:
    """Return how long a whole step takes with the base, and with each of ``names``.

    What a step costs depends on the memory that steps before it have freed, so that nobody shares a process.

    Args:
        case: Whose model; one of ``CASES``, with a batch.
        metric: "sam" or "asam".
        times: How many small batches' worth of examples.
        names: Of ``ONE_PASS``.
        rounds: Turns that are counted, with each of two sets of processes; the first of a round takes turns.
        device: Where.
        clock: A name in ``CLOCKS``.

    Raises:
        BenchmarkError: If a process died.
    """
    torch.manual_seed(0)
    parameters = list(case.build().parameters())
    order = ["base", *names]

    def in_own_processes() -> tuple[dict[str, list[float]], list[float]]:
        with ExitStack() as stack:
            runners = {
                name: stack.enter_context(_Runner(case.name, metric, times, name, device, clock)) for name in order
            }
            return in_turns(order, rounds, device, clock, lambda name: runners[name].step())

    sets = [in_own_processes() for _ in range(_SETS)]
    title, rates = name_at(case.name, times), list(chain(*(rates for _, rates in sets)))
    milliseconds = {name: list(chain(*(taken[name] for taken, _ in sets))) for name in order}
    return [
        measurement("batch", title, metric, name, parameters, milliseconds[name], rates, None, device, clock)
        for name in order
    ]


class _Runner:
    """A process that takes a step when it is told to."""

    def __init__(self, case: str, metric: str, times: int, name: str, device: torch.device, clock: str) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, case, metric, times, name, device, clock, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()

    def step(self) -> float:
        """Take a step, and return its seconds."""
        try:
            self._connection.send(None)
            taken: float = self._connection.recv()
        except (EOFError, OSError) as error:
            raise BenchmarkError(f"the process that ran {self._name} ended; its error is above") from error
        return taken


def _serve(
    connection: Connection,
    case_name: str,
    metric: str,
    times: int,
    name: str,
    device: torch.device,
    clock: str,
    threads: int,
) -> None:
    """Take a step for each message until the connection is closed, and answer with its seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = CASES[case_name]
    assert case.batch is not None
    module = case.build().to(device)
    inputs = case.batch(times).to(device)
    optimizer: Optimizer = AdamW(module.parameters(), **OPTIONS)
    if name in ONE_PASS:
        optimizer = samopt.MomentumSAM(
            optimizer, rho=RHO, adaptive=metric == "asam", model=module, backend=ONE_PASS[name]
        )

    def step() -> None:
        optimizer.zero_grad()
        case.loss(module, inputs).backward()
        optimizer.step()

    for _ in range(_WARM_UP):
        step()
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(seconds(device, clock, step))
