"""Times and memory of updates, the contenders in turns over one set of parameters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.environment import describe
from benchmarks.json_lines import as_lines, read_lines
from benchmarks.updates.cases import Case
from benchmarks.updates.clock import Copy, seconds
from benchmarks.updates.contenders import CONTENDERS, Contender, Update
from benchmarks.updates.memory import Memory

__all__ = [
    "Measurement",
    "in_turns",
    "measure_steps",
    "measure_updates",
    "measurement",
    "read_measurements",
    "write_measurements",
]


@dataclass(frozen=True)
class Measurement:
    """One contender on one case.

    Attributes:
        kind: "update", "step" (with the model's passes), "batch" (such steps in one pass), or "parameters" or
            "tensors" for a case of such growth.
        case: Name of the case; for "batch", with " x 4" for four times the examples of "step".
        metric: "sam" or "asam".
        contender: Name of the contender.
        elements: Number of parameters.
        tensors: Number of tensors.
        milliseconds: One for each round; rounds with the same index of one case and metric belong together.
        copy_rate: Bytes per second of a copy, one for each round.
        peak: Most bytes of tensors alive at once beyond the weights, one set of gradients and the base's state; None
            where it was not measured.
        retained: Bytes still alive after the step, without the gradients.
        environment: Commit, versions, device, threads, clock.
    """

    kind: str
    case: str
    metric: str
    contender: str
    elements: int
    tensors: int
    milliseconds: Sequence[float]
    copy_rate: Sequence[float]
    peak: int | None
    retained: int | None
    environment: Mapping[str, str | int]


class Bench:
    """Some parameters with gradients, and everyone who can update them here.

    Args:
        module: What holds the parameters.
        metric: "sam" or "asam".
        names: Contenders; those that cannot run here are left out.
        note: Called with a line of text for each that is left out.
    """

    def __init__(self, module: nn.Module, metric: str, names: Sequence[str], note: Callable[[str], None]) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._sources = [torch.randn_like(p).mul_(0.01) for p in self.parameters]
        self.updates: dict[str, Update] = {}
        for name in names:
            update = _build(CONTENDERS[name], self.parameters, metric, note)
            if update is not None:
                self.updates[name] = update
        self.take_step(next(iter(self.updates.values())))
        # One state for all of them: a copy each would not fit for the larger cases.
        state = next(iter(self.updates.values())).base.state
        for update in self.updates.values():
            update.base.state = state

    def set_gradients(self) -> None:
        """Give every parameter a gradient that nobody else holds, as a backward pass does."""
        for parameter, source in zip(self.parameters, self._sources, strict=True):
            parameter.grad = source.clone()

    def clear_gradients(self) -> None:
        """Take the gradients away."""
        for parameter in self.parameters:
            parameter.grad = None

    def take_step(self, update: Update) -> None:
        """Run both halves of an update, each along fresh gradients."""
        self.set_gradients()
        update.ascend()
        self.set_gradients()
        update.descend()

    def time_step(self, name: str, device: torch.device, clock: str) -> float:
        """Return the seconds of both halves, without what stands for the backward passes."""
        update = self.updates[name]
        self.set_gradients()
        first = seconds(device, clock, update.ascend) if name != "base" else 0.0
        if name != "base":
            self.set_gradients()
        return first + seconds(device, clock, update.descend)

    def memory_of(self, name: str) -> tuple[int, int]:
        """Return the bytes alive at the peak of a step and after it, beyond weights, gradients and the base's state."""
        update = self.updates[name]
        self.clear_gradients()
        gc.collect()
        known = [*self.parameters, *self._sources]
        known += [value for state in update.base.state.values() for value in state.values()]
        with Memory(known) as memory:
            self.take_step(update) if name != "base" else self._take_base_step(update)
            self.clear_gradients()
            gc.collect()
            retained = memory.alive()
        gradients = sum(source.nbytes for source in self._sources)
        return memory.peak - gradients, retained

    def _take_base_step(self, update: Update) -> None:
        self.set_gradients()
        update.descend()


def measure_updates(
    kind: str,
    case: Case,
    metric: str,
    names: Sequence[str],
    *,
    rounds: int,
    device: torch.device,
    clock: str,
    note: Callable[[str], None],
) -> list[Measurement]:
    """Return what each contender's own part of a step costs.

    Args:
        kind: For the rows; memory is measured for "update" only.
        case: Whose parameters.
        metric: "sam" or "asam".
        names: Contenders, with the base among them.
        rounds: Turns that are counted; one before them warms up.
        device: Where.
        clock: A name in ``CLOCKS``.
        note: Called with a line of text for each contender that cannot run.
    """
    torch.manual_seed(0)
    bench = Bench(case.build().to(device), metric, names, note)
    memory = {name: bench.memory_of(name) if kind == "update" else None for name in bench.updates}
    times, rates = in_turns(
        list(bench.updates), rounds, device, clock, lambda name: bench.time_step(name, device, clock)
    )
    return [
        measurement(kind, case.name, metric, name, bench.parameters, times[name], rates, memory[name], device, clock)
        for name in bench.updates
    ]


def measure_steps(
    case: Case,
    metric: str,
    names: Sequence[str],
    *,
    rounds: int,
    device: torch.device,
    clock: str,
    note: Callable[[str], None],
) -> list[Measurement]:
    """Return how long a whole step takes with each contender: the model's passes, and the update.

    Args:
        case: Whose model; it has a batch.
        metric: "sam" or "asam".
        names: Contenders, with the base among them.
        rounds: Turns that are counted; one before them warms up.
        device: Where.
        clock: A name in ``CLOCKS``.
        note: Called with a line of text for each contender that cannot run.
    """
    assert case.batch is not None
    torch.manual_seed(0)
    module = case.build().to(device)
    inputs = case.batch(1).to(device)
    bench = Bench(module, metric, names, note)

    def step(name: str) -> None:
        update = bench.updates[name]
        if name != "base":
            _backward(case, module, inputs)
            update.ascend()
        _backward(case, module, inputs)
        update.descend()

    times, rates = in_turns(
        list(bench.updates), rounds, device, clock, lambda name: seconds(device, clock, lambda: step(name))
    )
    return [
        measurement("step", case.name, metric, name, bench.parameters, times[name], rates, None, device, clock)
        for name in bench.updates
    ]


def write_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """Append measurements to a file, a JSON object a line.

    Args:
        path: The file.
        measurements: What to add.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(as_lines(measurements))


def read_measurements(path: Path) -> list[Measurement]:
    """Return what ``write_measurements`` wrote; nothing where there is no file.

    Args:
        path: The file.

    Raises:
        BenchmarkError: If it holds something else.
    """
    return read_lines(path, Measurement, "measurements", "remove it, or give another --output")


def _build(
    contender: Contender, parameters: Sequence[Tensor], metric: str, note: Callable[[str], None]
) -> Update | None:
    try:
        return contender.build(parameters, metric)
    except (ImportError, RuntimeError) as error:
        note(f"{contender.name} is left out: {error}")
        return None


def _backward(case: Case, module: nn.Module, inputs: Tensor) -> None:
    module.zero_grad()
    case.loss(module, inputs).backward()


def in_turns(
    names: Sequence[str], rounds: int, device: torch.device, clock: str, time_one: Callable[[str], float]
) -> tuple[dict[str, list[float]], list[float]]:
    """Return the milliseconds of each, and the rate of a copy, round by round; the first of a round takes turns.

    Args:
        names: Whom to time.
        rounds: Turns that are counted; one before them warms up.
        device: Where.
        clock: A name in ``CLOCKS``.
        time_one: Returns the seconds of one of ``names``.
    """
    copying = Copy(device, clock)
    times: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for turn in range(rounds + 1):
        first = turn % len(names)
        rates.append(copying.rate())
        for name in (*names[first:], *names[:first]):
            times[name].append(1000 * time_one(name))
    return {name: values[1:] for name, values in times.items()}, rates[1:]


def measurement(
    kind: str,
    case: str,
    metric: str,
    name: str,
    parameters: Sequence[Tensor],
    times: list[float],
    rates: list[float],
    memory: tuple[int, int] | None,
    device: torch.device,
    clock: str,
) -> Measurement:
    """Return a measurement with the sizes of its parameters and the present environment.

    Args:
        kind: As in ``Measurement``.
        case: Likewise.
        metric: Likewise.
        name: The contender's.
        parameters: What it updates.
        times: Milliseconds of each round.
        rates: Of a copy, in each round.
        memory: Bytes at the peak, and retained; None where they were not measured.
        device: Where it ran.
        clock: A name in ``CLOCKS``.
    """
    peak, retained = memory or (None, None)
    elements = sum(parameter.numel() for parameter in parameters)
    environment = describe(device) | {"clock": "events" if device.type == "cuda" else clock}
    return Measurement(kind, case, metric, name, elements, len(parameters), times, rates, peak, retained, environment)
