"""Whole steps in one pass against the base's, each in a process of its own as a user's run is, in turns."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from types import TracebackType

import torch
from torch.optim import AdamW, Optimizer

import samopt
from benchmarks.errors import BenchmarkError
from benchmarks.updates.cases import CASES, Case
from benchmarks.updates.clock import Copy, seconds
from benchmarks.updates.contenders import OPTIONS, RHO
from benchmarks.updates.measure import Measurement, measurement

__all__ = ["ONE_PASS", "measure_alone"]

ONE_PASS = {"samopt-one-pass": "auto", "samopt-one-pass-swap": "swap"}
"""The one-pass form on its backends, by name."""

_WARM_UP = 3  # steps: the first has no momentum, and memory is handed out anew
_SETS = (
    2  # of processes, one after the other: where the system puts the memory of one makes a difference of a few percent
)


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
    copying = Copy(device, clock)
    rates = []
    milliseconds: dict[str, list[float]] = {name: [] for name in ("base", *names)}
    order = list(milliseconds)
    for _ in range(_SETS):
        with ExitStack() as stack:
            runners = {
                name: stack.enter_context(_Runner(case.name, metric, times, name, device, clock)) for name in order
            }
            for turn in range(rounds):
                first = turn % len(order)
                rates.append(copying.rate())
                for name in (*order[first:], *order[:first]):
                    milliseconds[name].append(1000 * runners[name].step())
    title = f"{case.name} x {times}"
    return [
        measurement("batch", title, metric, name, parameters, taken, rates, None, device, clock)
        for name, taken in milliseconds.items()
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
