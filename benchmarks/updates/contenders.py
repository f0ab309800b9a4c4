"""Who updates them: the base alone, two loops, another package, and every backend of samopt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import samopt
from samopt.kernels import BACKENDS

__all__ = ["CONTENDERS", "ETA", "METRICS", "OPTIONS", "RHO", "Contender", "Update"]

METRICS = ("sam", "asam")
RHO = 0.05
ETA = 0.01
OPTIONS: dict[str, Any] = {"lr": 1e-4, "fused": True}
"""Of AdamW, everybody's base."""


class Update(Protocol):
    """The optimizer's part of a step, in two halves around the second gradient."""

    base: Optimizer

    def ascend(self) -> None:
        """Move the weights uphill along their gradients."""

    def descend(self) -> None:
        """Put the weights back and step the base along the gradients that are there now."""


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        name: What a person types.
        build: Makes the update for some parameters and a metric; raises ImportError or RuntimeError, with the reason,
            where it cannot.
        moved: Bytes that it reads and writes per fp32 element beyond the base's step, for SAM and for ASAM; None where
            nobody counted.
    """

    name: str
    build: Callable[[Sequence[Tensor], str], Update]
    moved: tuple[int, int] | None


class _Alone:
    """The base's own step: no ascent."""

    def __init__(self, parameters: Sequence[Tensor], metric: str) -> None:
        self.base = _base(parameters)

    def ascend(self) -> None:
        pass

    def descend(self) -> None:
        self.base.step()


class _Loop:
    """One tensor after the other, with a copy of each weight."""

    def __init__(self, parameters: Sequence[Tensor], metric: str) -> None:
        self.base = _base(parameters)
        self._parameters = parameters
        self._adaptive = metric == "asam"
        self._old: list[Tensor] = []


class _Textbook(_Loop):
    """SAM as most scripts have it: for each tensor clone, multiply, add, clear the gradient, and copy back."""

    @torch.no_grad()
    def ascend(self) -> None:
        lengths = [(self._stretch(p) * p.grad if self._stretches(p) else p.grad).norm() for p in self._parameters]
        scale = RHO / torch.stack(lengths).norm()
        self._old = []
        for parameter in self._parameters:
            self._old.append(parameter.clone())
            move = parameter.grad * scale
            if self._stretches(parameter):
                move = self._stretch(parameter) ** 2 * move
            parameter.add_(move)
        self.base.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for parameter, old in zip(self._parameters, self._old, strict=True):
            parameter.copy_(old)
        self._old = []
        self.base.step()

    def _stretches(self, parameter: Tensor) -> bool:
        return self._adaptive and parameter.dim() > 1

    def _stretch(self, parameter: Tensor) -> Tensor:
        return parameter.abs() + ETA


class _Script(_Loop):
    """The loop that most projects copy, operation by operation: davda54/sam on GitHub, with its products by 1.0.

    Its adaptive form has no stabiliser and stretches biases too. A weight's memory is another after each step.
    """

    @torch.no_grad()
    def ascend(self) -> None:
        lengths = [((p.abs() if self._adaptive else 1.0) * p.grad).norm() for p in self._parameters]
        scale = RHO / (torch.stack(lengths).norm() + 1e-12)
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


class _Package:
    """The SAM of the package pytorch_optimizer."""

    def __init__(self, parameters: Sequence[Tensor], metric: str) -> None:
        from pytorch_optimizer import SAM  # an extra that not everybody has

        self._optimizer = SAM(parameters, AdamW, rho=RHO, adaptive=metric == "asam", **OPTIONS)
        self.base = self._optimizer.base_optimizer

    def ascend(self) -> None:
        self._optimizer.first_step(zero_grad=True)

    def descend(self) -> None:
        self._optimizer.second_step()


class _Ours:
    """A backend of samopt."""

    def __init__(self, backend: str, parameters: Sequence[Tensor], metric: str, **options: Any) -> None:
        self.base = _base(parameters)
        wrap = samopt.ASAM if metric == "asam" else samopt.SAM
        self._optimizer = wrap(self.base, rho=RHO, backend=backend, warn_on_stall=False, **options)
        self._parameters = parameters
        for parameter in parameters[:1]:
            self._try(parameter)

    def ascend(self) -> None:
        self._optimizer.ascend()

    def descend(self) -> None:
        self._optimizer.restore()
        self._optimizer.step()

    def _try(self, parameter: Tensor) -> None:
        """Raise if the backend does not run here."""
        parameter.grad = torch.ones_like(parameter)
        self._optimizer.ascend()
        self._optimizer.restore()
        self._optimizer.zero_grad()


def _base(parameters: Sequence[Tensor]) -> Optimizer:
    return AdamW(parameters, **OPTIONS)


def _ours(backend: str, **options: Any) -> Callable[[Sequence[Tensor], str], Update]:
    return lambda parameters, metric: _Ours(backend, parameters, metric, **options)


_MOVED: dict[str, tuple[int, int]] = {
    "triton": (28, 32),
}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("base", _Alone, (0, 0)),
        Contender("textbook", _Textbook, (40, 104)),
        Contender("script", _Script, (48, 72)),
        Contender("pytorch_optimizer", _Package, None),
        *(Contender(f"samopt-{name}", _ours(name), _MOVED.get(name)) for name in BACKENDS),
        Contender("samopt-lean", _ours("auto", measure_grad_norms=False), None),
    )
}
"""By name. Every samopt backend measures gradient norms for ``last_step``, as by default; those called lean do not."""
