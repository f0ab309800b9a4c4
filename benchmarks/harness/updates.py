"""Two kinds of contenders: updates (the optimizer's own part of a step), and whole steps in every form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import samopt
from benchmarks.harness.networks import loss_of
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.kernels import BACKENDS
from samopt.parts.geometry import Adaptive, Euclidean, Geometry

RHO, ETA = 0.05, 0.01
BAREST = "one-pass-barest"
"""What one pass in whole steps is measured against."""

MOVED = {
    "base": (0, 0), "textbook": (40, 104), "script": (48, 72), "samopt-swap": (16, 20), "samopt-triton": (28, 32),
}  # fmt: skip
"""Bytes that each moves per fp32 element beyond the base's step, with SAM's and ASAM's geometry, where known;
"samopt-swap" is gone, but rows of it are published."""
BASE_MOVES = 28
"""Bytes an element that fused AdamW moves."""

MakeBase = Callable[[Iterable[Tensor]], Optimizer]


class Update(Protocol):
    """The optimizer's part of a step, in two halves around the second gradient."""

    base: Optimizer

    def ascend(self) -> None:
        """Move the weights uphill along their gradients."""

    def descend(self) -> None:
        """Put the weights back and step the base along the gradients that are there now."""


class _Alone:
    """The base's own step: no ascent."""

    def __init__(self, parameters: Sequence[Tensor], geometry: str, make_base: MakeBase) -> None:
        self.base = make_base(parameters)

    def ascend(self) -> None:
        pass

    def descend(self) -> None:
        self.base.step()


class _Textbook(_Alone):
    """SAM from the paper's formula: for each tensor clone, multiply, add, clear the gradient, and copy back."""

    def __init__(self, parameters: Sequence[Tensor], geometry: str, make_base: MakeBase) -> None:
        super().__init__(parameters, geometry, make_base)
        self._parameters, self._adaptive = list(parameters), geometry == "asam"
        self._old: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> None:
        norms = [(self._t(p) * p.grad if self._scaled(p) else p.grad).norm() for p in self._parameters]
        scale = RHO / torch.stack(norms).norm()
        for parameter in self._parameters:
            self._old.append(parameter.clone())
            move = parameter.grad * scale
            parameter.add_(self._t(parameter) ** 2 * move if self._scaled(parameter) else move)
        self.base.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for parameter, old in zip(self._parameters, self._old, strict=True):
            parameter.copy_(old)
        self._old = []
        self.base.step()

    def _scaled(self, parameter: Tensor) -> bool:
        return self._adaptive and parameter.dim() > 1

    def _t(self, parameter: Tensor) -> Tensor:
        return parameter.abs() + ETA


class _Script(_Textbook):
    """The loop that most projects copy, in the operations of davda54/sam on GitHub, its products by 1.0 among them.

    Its adaptive form has no stabiliser and scales biases too. A weight's memory is another after each step.
    """

    @torch.no_grad()
    def ascend(self) -> None:
        norms = [((p.abs() if self._adaptive else 1.0) * p.grad).norm() for p in self._parameters]
        scale = RHO / (torch.stack(norms).norm() + 1e-12)
        for parameter in self._parameters:
            self._old.append(parameter.data.clone())
            parameter.add_((parameter.pow(2) if self._adaptive else 1.0) * parameter.grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for parameter, old in zip(self._parameters, self._old, strict=True):
            parameter.data = old
        self._old = []
        self.base.step()


class _TwoSteps:
    """An optimizer with ``first_step`` and ``second_step``: samopt's, or the package pytorch_optimizer's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self.base = optimizer, optimizer.base_optimizer

    def ascend(self) -> None:
        self._optimizer.first_step(zero_grad=True)

    def descend(self) -> None:
        self._optimizer.second_step()


class _Displaced(_Alone):
    """What one pass adds: ``w + epsilon`` along the base's momentum is written beside the weights, which stay."""

    def __init__(self, parameters: Sequence[Tensor], geometry: str, make_base: MakeBase) -> None:
        super().__init__(parameters, geometry, make_base)
        self._parameters, self._memory = list(parameters), ScratchPool()
        self._geometry: Geometry = Adaptive() if geometry == "asam" else Euclidean()

    def ascend(self) -> None:
        states = self.base.state
        momenta = [states[p]["exp_avg"] if p in states else p.grad for p in self._parameters]
        targets = Targets(Region(RHO, ETA, 1), self._parameters, momenta)
        Perturbation([targets], self._geometry).displaced(self._memory)


def _package(parameters: Sequence[Tensor], geometry: str, make_base: MakeBase) -> Update:
    from pytorch_optimizer import SAM  # an optional package

    return _TwoSteps(SAM(parameters, AdamW, rho=RHO, adaptive=geometry == "asam", lr=1e-4, fused=True))


def _ours(parameters: Sequence[Tensor], geometry: str, make_base: MakeBase, **options: Any) -> Update:
    base = make_base(parameters)
    optimizer = samopt.create(geometry, base, rho=RHO, warn_on_stall=False, **options)
    probe = parameters[0]  # raises where the backend does not run
    probe.grad = torch.ones_like(probe)
    optimizer.first_step(zero_grad=True)
    probe.grad = None
    getattr(optimizer, "restore", optimizer.zero_grad)()
    optimizer.zero_grad()
    return _TwoSteps(optimizer)


UPDATES: dict[str, Callable[[Sequence[Tensor], str, MakeBase], Update]] = {
    "base": _Alone,
    "textbook": _Textbook,
    "script": _Script,
    "pytorch_optimizer": _package,
    **{f"samopt-{name}": partial(_ours, backend=name) for name in BACKENDS},
    "samopt-lean": partial(_ours, measure_grad_norms=False),
    "displaced": _Displaced,
}
"""By name. "displaced" is one pass's part; its gradient is handed out once more than in use. Every samopt backend
measures gradient norms for ``last_step``, as by default; "lean" does not."""


WITHOUT_MODEL = "sam-without-model"

STEPS = ("base", "script", "sam-backward", "sam-perturbed", "sam-closure", WITHOUT_MODEL, BAREST, "one-pass")
"""The forms of a whole step: the base; the loop of davda54/sam; samopt in its three two-pass forms; the second of these
without ``model=``, so that nothing of the model's state is kept; the barest one pass by hand (norm, copies, one foreach
addition, copies back); samopt in one pass."""


def make_step(form: str, module: nn.Module, inputs: Tensor, base: Optimizer, geometry: str) -> Callable[[], None]:
    """Return a function that takes a whole step."""

    def loss() -> Tensor:
        return loss_of(module, inputs)

    def first_pass(optimizer: Any = base) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def plain() -> None:
        first_pass()
        base.step()

    parameters = list(module.parameters())
    if form == "base":
        return plain
    if form == "script":
        script = _Script(parameters, geometry, lambda _: base)

        def by_script() -> None:
            first_pass()
            script.ascend()
            loss().backward()
            script.descend()

        return by_script
    if form == BAREST:
        return partial(_barest, parameters, base, geometry, first_pass, [])
    if form == "one-pass":
        one: Any = samopt.create(
            "momentum-sam", base, rho=RHO, adaptive=geometry == "asam", uphill=True, model=module, warn_on_stall=False
        )

        def in_one_pass() -> None:
            first_pass(one)
            one.step()

        return in_one_pass
    model = None if form == WITHOUT_MODEL else module
    two: Any = samopt.create(geometry, base, rho=RHO, model=model, warn_on_stall=False)
    if form == "sam-closure":
        return lambda: two.step(partial(first_pass, two))
    if form in ("sam-perturbed", WITHOUT_MODEL):

        def by_context() -> None:
            value = first_pass(two)
            with two.perturbed(value):
                loss().backward()
            two.step()

        return by_context

    def by_backward() -> None:
        two.zero_grad()
        two.backward(loss)
        two.step()

    return by_backward


def _barest(
    parameters: list[Tensor], base: Optimizer, geometry: str, run: Callable[[], Tensor], saved: list[Tensor]
) -> None:
    """One pass with nothing checked: uphill along the momentum, forward and backward, back, the base's step."""
    with torch.no_grad():
        states = [base.state[parameter] for parameter in parameters]
        momenta: Any = [state.get("momentum_buffer", state.get("exp_avg")) for state in states]
        if not saved:
            saved.extend(torch.empty_like(parameter) for parameter in parameters)
        torch._foreach_copy_(saved, parameters)
        if geometry == "asam":
            scaled = [p.dim() > 1 for p in parameters]
            squared = torch._foreach_abs([p for p, s in zip(parameters, scaled, strict=True) if s])
            torch._foreach_add_(squared, ETA)
            parts = iter(torch._foreach_mul(squared, [m for m, s in zip(momenta, scaled, strict=True) if s]))
            momenta = [next(parts) if s else m for m, s in zip(momenta, scaled, strict=True)]  # T m
        norm = torch.stack(torch._foreach_norm(momenta)).norm()
        if geometry == "asam":
            torch._foreach_mul_([m for m, s in zip(momenta, scaled, strict=True) if s], squared)  # T^2 m
        torch._foreach_add_(parameters, momenta, alpha=RHO / float(norm))
    run()
    with torch.no_grad():
        torch._foreach_copy_(parameters, saved)
    base.step()
