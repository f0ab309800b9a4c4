"""Times and memory of updates and of whole steps, the contenders in turns in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness.environment import describe
from benchmarks.harness.networks import Case
from benchmarks.harness.timing import Clock, Copy, in_turns, peak_bytes, seconds
from benchmarks.harness.updates import UPDATES, Update, make_step


@dataclass(frozen=True)
class Measurement:
    """One contender on one case.

    Attributes:
        kind: "update", "step" (with the model's passes), or "parameters" or "tensors" for an update of growing cases.
        case: Name of the case; for "step", with " x 4" for four times the smallest batch.
        geometry: "sam" or "asam".
        contender: A name in ``UPDATES``, or in ``STEPS``.
        elements: Number of parameters.
        tensors: Number of tensors.
        milliseconds: One for each round; rounds with the same index of one case and geometry belong together.
        copy_rate: Bytes per second of a copy, one for each round of an update.
        peak: Most bytes of tensors alive at once; for an update beyond the weights, one set of gradients and the base's
            state, for a step beyond the weights and the base's state. None where it was not measured.
        retained: Bytes still alive after the step, without the gradients.
        environment: Commit, versions, device, threads, clock.
    """

    kind: str
    case: str
    geometry: str
    contender: str
    elements: int
    tensors: int
    milliseconds: list[float]
    copy_rate: list[float]
    peak: int | None
    retained: int | None
    environment: dict[str, str | int]


def measure_updates(
    kind: str, case: Case, geometry: str, names: Sequence[str], rounds: int, device: torch.device, clock: Clock,
    watch: Callable[[str, Callable[[], object]], None] | None = None,
) -> Iterator[Measurement]:  # fmt: skip
    """Yield what each contender's own part of a step costs; those that cannot run here are left out, with a line.

    Args:
        kind: As in ``Measurement``.
        case: Whose parameters to update.
        geometry: "sam" or "asam".
        names: Of contenders, "base" first.
        rounds: Turns of each.
        device: Where the parameters are.
        clock: What they are timed by on a CPU.
        watch: Called once with each name and a function that makes its update; that function first copies the
            gradients, tensor by tensor: once for the base, twice for the others.
    """
    torch.manual_seed(0)
    with device:  # a GPU makes large tables of random numbers faster
        parameters = [p for p in case.build().parameters() if p.requires_grad]
    sources = [torch.randn_like(p).mul_(0.01) for p in parameters]
    updates: dict[str, Update] = {}
    for name in names:
        try:
            updates[name] = UPDATES[name](parameters, geometry, case.base)
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}", flush=True)

    def set_gradients() -> None:
        """Give every parameter a gradient that nothing else holds, as a backward pass does."""
        for parameter, source in zip(parameters, sources, strict=True):
            parameter.grad = source.clone()

    def take(name: str) -> float:
        """Return the seconds of both halves, without what stands for the backward passes."""
        first = 0.0
        if name != "base":
            set_gradients()
            first = seconds(device, clock, updates[name].ascend)
        set_gradients()
        return first + seconds(device, clock, updates[name].descend)

    def take_and_clear(name: str) -> None:
        take(name)
        for parameter in parameters:
            parameter.grad = None

    take("base")
    for update in updates.values():
        update.base.state = updates["base"].base.state
    memory: dict[str, tuple[int | None, int | None]] = dict.fromkeys(updates, (None, None))
    if kind == "update":
        gradients = sum(source.nbytes for source in sources)
        known = [*parameters, *sources, *_state_tensors(updates["base"].base)]
        for name in updates:
            for parameter in parameters:
                parameter.grad = None
            peak, retained = peak_bytes(device, lambda name=name: take_and_clear(name), known)
            memory[name] = (peak - gradients, retained)
    for name in updates if watch is not None else ():
        watch(name, partial(take, name))
    times, rates = in_turns(list(updates), rounds, take, Copy(device, clock))
    for name in updates:
        yield _row(kind, case.name, geometry, name, parameters, times[name], rates, memory[name], device, clock)


def measure_steps(
    case: Case, times: int, geometry: str, forms: Sequence[str], rounds: int, device: torch.device, clock: Clock
) -> Iterator[Measurement]:
    """Yield what a whole step costs in each form, each on a model of its own; the base's state is shared."""
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, tuple[int, int]] = {}
    first: tuple[nn.Module, Optimizer] | None = None
    assert case.batch is not None
    inputs = case.batch(times).to(device)
    for form in forms:
        torch.manual_seed(0)
        module = case.build().to(device)
        base = case.base(module.parameters())
        if first is None:
            make_step("base", module, inputs, base, geometry)()
            first = module, base
        else:
            for parameter, theirs in zip(module.parameters(), first[0].parameters(), strict=True):
                base.state[parameter] = first[1].state[theirs]
        try:
            steps[form] = make_step(form, module, inputs, base, geometry)
        except RuntimeError as error:
            print(f"{form} is left out: {error}", flush=True)
            continue
        known = [*module.parameters(), *_state_tensors(base), inputs]

        def take_and_clear(form: str = form, module: nn.Module = module) -> None:
            steps[form]()
            module.zero_grad()

        module.zero_grad()
        memory[form] = peak_bytes(device, take_and_clear, known)
    taken, _ = in_turns(list(steps), rounds, lambda form: seconds(device, clock, steps[form]))
    parameters = list(first[0].parameters()) if first else []
    for form in steps:
        yield _row(
            "step", name_at(case, times), geometry, form, parameters, taken[form], [], memory[form], device, clock
        )


def _state_tensors(base: Optimizer) -> list[Tensor]:
    return [v for state in base.state.values() for v in state.values() if isinstance(v, Tensor)]


def _row(
    kind: str, case: str, geometry: str, name: str, parameters: Sequence[Tensor], times: list[float],
    rates: list[float], memory: tuple[int | None, int | None], device: torch.device, clock: Clock,
) -> Measurement:  # fmt: skip
    elements = sum(parameter.numel() for parameter in parameters)
    environment = describe(device) | {"clock": "events" if device.type == "cuda" else clock}
    return Measurement(kind, case, geometry, name, elements, len(parameters), times, rates, *memory, environment)


def name_at(case: Case, times: int) -> str:
    """Return what a row calls a case with a number of smallest batches."""
    return f"{case.name} x {times}"
