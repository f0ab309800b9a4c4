"""Which way is uphill: the direction ``d`` of a perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from samopt._step.arguments import check_nonnegative
from samopt.parts.checkpoint import by_parameter, in_order

__all__ = [
    "Direction",
    "Friendly",
    "GradientDirection",
    "Momentum",
    "ReusedGradient",
    "StatefulDirection",
    "TakenDirection",
    "named_direction",
]

_BUFFERS = ("momentum_buffer", "exp_avg")
_NAMED = ("gradient", "momentum", "momentum-ahead")


@runtime_checkable
class Direction(Protocol):
    """A direction that is known before a batch's gradient, so that no first pass is needed for it.

    It may have a ``sign``: 1, as without one, or -1 to move the other way.
    """

    def of(self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer) -> list[Tensor | None]:
        """Return the direction of each parameter of a group, of its shape, or None while there is none.

        A direction points uphill for what the group optimizes: up the loss, or down it under ``maximize=True``.
        """


@runtime_checkable
class StatefulDirection(Protocol):
    """A direction that keeps something from one step to the next."""

    def advance(self) -> None:
        """Go on to the next step: the base is about to be stepped."""

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return what a checkpoint must hold; ``parameters`` are all of them, in the order of the groups."""

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Continue from what ``state_dict`` returned; from the start where that is empty."""


@runtime_checkable
class GradientDirection(StatefulDirection, Protocol):
    """A direction that is made from this batch's gradients, so that a step takes two passes."""

    def turn(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the direction of each parameter, of its gradient's shape and dtype; the gradients are left alone."""


@runtime_checkable
class TakenDirection(Direction, StatefulDirection, Protocol):
    """A direction that is taken in passes of its own (``first_pass``), less often or on less data than each batch."""

    def is_due(self) -> bool:
        """Return whether a new direction is needed before this step's ascent."""

    def take(self, parameters: Sequence[Tensor]) -> None:
        """Make the direction from the parameters' gradients."""


class Friendly:
    """The batch's own part of its gradient: ``g - sigma m``, with ``m`` the running average of gradients.

    ``m_t = decay m_{t-1} + (1 - decay) g_t`` starts from 0 and stands for the gradient of the whole data. Source: Li et
    al. 2024, "Friendly Sharpness-Aware Minimization", algorithm 1.

    Cost: one copy of the gradients is kept in at least fp32, and saved in checkpoints; a second one lives between
    ascent and update. Among several ranks the first pass's gradients are averaged, so that all keep the same ``m``.

    Args:
        sigma: How much of the average is taken out, >= 0. 0 is SAM's direction.
        decay: Weight of the past (the paper's lambda), in [0, 1).

    Raises:
        ValueError: If an argument is out of range; at the first step, if a gradient is sparse.
    """

    def __init__(self, sigma: float = 1.0, decay: float = 0.9) -> None:
        check_nonnegative("sigma", sigma)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.sigma = sigma
        self.decay = decay
        self._average: dict[Tensor, Tensor] = {}
        self._next: dict[Tensor, Tensor] = {}

    def turn(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ``g - sigma m``; ``m`` is kept when the step is taken."""
        directions = []
        self._next = {}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient.layout is not torch.strided:
                raise ValueError(
                    f"the friendly direction averages gradients, but one is {gradient.layout}; use sparse=False in the "
                    "embedding, or a parameter group with perturb=False for it"
                )
            wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
            average = wide * (1 - self.decay)
            if parameter in self._average:
                average.add_(self._average[parameter], alpha=self.decay)
            self._next[parameter] = average
            directions.append(wide.sub(average, alpha=self.sigma).to(gradient.dtype))
        return directions

    def advance(self) -> None:
        """Keep the average that the step was taken with."""
        self._average |= self._next
        self._next = {}

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the average of each parameter, None where it has none."""
        return {"average": in_order(self._average, parameters)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take the averages over."""
        self._next = {}
        self._average = by_parameter(state.get("average", []), parameters)


class ReusedGradient:
    """The gradient of a first pass of its own, for several steps: of a whole batch, or of part of one.

    A step costs one pass, and the first pass every ``every`` steps. That pass leaves nothing behind but the direction:
    gradients, buffers and random streams are put back after it. Take it with
    ``optimizer.step(closure, ascent_closure)``, or in ``with optimizer.first_pass():`` where
    ``optimizer.needs_first_pass`` says so.

    Cost: ``1 + part / every`` times the base's, for that part of a batch; one copy of the gradients is kept, and saved
    in checkpoints. Sources: reuse, Liu et al. 2022, "Towards Efficient and Scalable Sharpness-Aware Minimization"; part
    of a batch, Du et al. 2022, "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks".

    Args:
        every: Steps that one direction serves, >= 1. Where a ``GradScaler`` skips a step, it serves one more.

    Raises:
        ValueError: If ``every`` is less than 1.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self._age: int | None = None
        self._gradients: dict[Tensor, Tensor] = {}

    def is_due(self) -> bool:
        """Return whether the gradient has served its steps."""
        return self._age is None or self._age >= self.every

    def take(self, parameters: Sequence[Tensor]) -> None:
        """Keep the present gradients.

        Raises:
            RuntimeError: If there are none.
        """
        taken = {parameter: parameter.grad.detach() for parameter in parameters if parameter.grad is not None}
        if not taken:
            raise RuntimeError("first_pass() ended without gradients; call loss.backward() inside it")
        self._gradients = taken
        self._age = 0

    def of(self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer) -> list[Tensor | None]:
        """Return the gradients that were kept, None where there was none; downhill where ``maximize`` is set."""
        gradients = [self._gradients.get(parameter) for parameter in parameters]
        if group.get("maximize", False):
            return [None if gradient is None else -gradient for gradient in gradients]
        return gradients

    def advance(self) -> None:
        """Count the step."""
        if self._age is not None:
            self._age += 1

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the gradients that were kept, None where there are none, and how many steps they served."""
        return {"age": self._age, "gradients": in_order(self._gradients, parameters)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take the gradients over."""
        self._age = state.get("age")
        self._gradients = by_parameter(state.get("gradients", []), parameters)


class Momentum:
    """The base optimizer's running average of gradients, after Becker et al. 2024, Momentum-SAM.

    It is SGD's ``momentum_buffer``, or the first moment ``exp_avg`` of Adam and its relatives; bias correction is a
    common factor and cancels in the normalised direction.

    Args:
        preconditioned: Divide by ``sqrt(v) + eps`` with the bias-corrected second moment, so that the direction is the
            step that Adam would take.
        ahead: Move the other way, downhill along the average, as the authors' code does: ahead of the base's step, as
            Nesterov's method looks, but further.
        buffer: Name of the entry in the base's state, for other optimizers.

    Raises:
        ValueError: Where an optimizer is made with it, if the base has a momentum of 0; at the second step, if the
            base's state has no such entry.
    """

    def __init__(self, *, preconditioned: bool = False, ahead: bool = False, buffer: str | None = None) -> None:
        self.preconditioned = preconditioned
        self.sign = -1 if ahead else 1
        self.buffer = buffer

    def check(self, base: Optimizer) -> None:
        """Raise if the base is seen to keep no momentum.

        Args:
            base: The base optimizer.

        Raises:
            ValueError: If it is SGD, or like it, with a momentum of 0.
        """
        if self.buffer is None and any(group.get("momentum") == 0 for group in base.param_groups):
            raise ValueError(self._missing(base, "has momentum=0"))

    def of(self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer) -> list[Tensor | None]:
        """Return the running averages, None before the base's first step for a parameter."""
        states = [base.state.get(parameter) for parameter in parameters]
        for name in self._names:
            momenta = [state.get(name) if state else None for state in states]
            if all([momentum is not None or not state for momentum, state in zip(momenta, states, strict=True)]):
                break
        else:
            momenta = [self._buffer_of(state, base) if state else None for state in states]
        if not self.preconditioned:
            return momenta
        return [
            None if momentum is None else _preconditioned(momentum, state, group, base)
            for momentum, state in zip(momenta, states, strict=True)
        ]

    def _buffer_of(self, state: dict[str, Any], base: Optimizer) -> Tensor:
        for name in self._names:
            if (found := state.get(name)) is not None:
                buffer: Tensor = found
                return buffer
        raise ValueError(self._missing(base, f"keeps {sorted(map(str, state))}"))

    @property
    def _names(self) -> tuple[str, ...]:
        return (self.buffer,) if self.buffer is not None else _BUFFERS

    def _missing(self, base: Optimizer, found: str) -> str:
        return (
            f"the momentum direction needs {' or '.join(self._names)} in the base optimizer's state, but "
            f"{type(base).__name__} {found}; give the base momentum (as in SGD(..., momentum=0.9)), or name its buffer "
            'with samopt.parts.direction.Momentum(buffer="...")'
        )


def _preconditioned(momentum: Tensor, state: Any, group: dict[str, Any], base: Optimizer) -> Tensor:
    if "exp_avg_sq" not in state:
        raise ValueError(
            f"a preconditioned momentum direction needs Adam's second moment, but the state of "
            f"{type(base).__name__} has {sorted(state)}; use preconditioned=False"
        )
    _, beta2 = group["betas"]
    taken = state["step"]  # on the host or, where a capturable or fused base counts, on the device
    correction = 1 - beta2 ** (taken if isinstance(taken, Tensor) and not taken.is_cpu else float(taken))
    step: Tensor = momentum / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
    return step


def named_direction(direction: str | Direction | GradientDirection) -> Direction | GradientDirection | None:
    """Return the direction that a user named, or None for this batch's gradient.

    Args:
        direction: "gradient", "momentum", "momentum-ahead", or a direction.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a direction.
    """
    accepted = (
        'direction must be "gradient", "momentum", "momentum-ahead", or an object from samopt.parts.direction; got '
        f"{direction!r}"
    )
    if isinstance(direction, str):
        if direction not in _NAMED:
            raise ValueError(accepted)
        return None if direction == "gradient" else Momentum(ahead=direction == "momentum-ahead")
    if isinstance(direction, type) or not isinstance(direction, Direction | GradientDirection):
        raise TypeError(accepted)
    return direction
