"""Which way is uphill: the direction ``d`` of a perturbation."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Direction", "Momentum", "named_direction"]

_BUFFERS = ("momentum_buffer", "exp_avg")


@runtime_checkable
class Direction(Protocol):
    """A direction that is known before a batch's gradient, so that no first pass is needed for it."""

    def of(self, parameter: Tensor, group: dict[str, Any], base: Optimizer) -> Tensor | None:
        """Return the direction of ``parameter``, of its shape, or None while there is none.

        A direction points uphill for what the group optimizes: up the loss, or down it under ``maximize=True``.
        """


class Momentum:
    """The base optimizer's running average of gradients (Becker et al. 2024, Momentum-SAM, equation 4).

    It is SGD's ``momentum_buffer``, or the first moment ``exp_avg`` of Adam and its relatives; bias correction is a
    common factor and cancels in the normalised direction.

    Args:
        preconditioned: Divide by ``sqrt(v) + eps`` with the bias-corrected second moment, so that the direction is the
            step that Adam would take.
        buffer: Name of the entry in the base's state, for other optimizers.

    Raises:
        ValueError: At the first use, if the base's state has no such entry.
    """

    def __init__(self, *, preconditioned: bool = False, buffer: str | None = None) -> None:
        self.preconditioned = preconditioned
        self.buffer = buffer

    def of(self, parameter: Tensor, group: dict[str, Any], base: Optimizer) -> Tensor | None:
        """Return the running average, or None before the base's first step for this parameter."""
        state = base.state.get(parameter)
        if not state:
            return None
        momentum = self._buffer_of(state, base)
        if momentum is None or not self.preconditioned:
            return momentum
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"a preconditioned momentum direction needs Adam's second moment, but the state of "
                f"{type(base).__name__} has {sorted(state)}; use preconditioned=False"
            )
        _, beta2 = group["betas"]
        correction = 1 - beta2 ** torch.as_tensor(state["step"], device=momentum.device)
        preconditioned: Tensor = momentum / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
        return preconditioned

    def _buffer_of(self, state: dict[str, Any], base: Optimizer) -> Tensor | None:
        names = (self.buffer,) if self.buffer is not None else _BUFFERS
        for name in names:
            if name in state:
                buffer: Tensor | None = state[name]
                return buffer
        raise ValueError(
            f"the momentum direction needs {' or '.join(names)} in the base optimizer's state, but "
            f"{type(base).__name__} keeps {sorted(map(str, state))}; give the base momentum (as in SGD(..., "
            'momentum=0.9)), or name its buffer with samopt.direction.Momentum(buffer="...")'
        )


def named_direction(direction: str | Direction) -> Direction | None:
    """Return the direction that a user named, or None for this batch's gradient.

    Args:
        direction: "gradient", "momentum", or a direction.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a direction.
    """
    if isinstance(direction, str):
        if direction not in ("gradient", "momentum"):
            raise ValueError(
                f'direction must be "gradient", "momentum", or an object from samopt.direction; got {direction!r}'
            )
        return Momentum() if direction == "momentum" else None
    if not isinstance(direction, Direction):
        raise TypeError(
            f'direction must be "gradient", "momentum", or an object from samopt.direction; got {direction!r}'
        )
    return direction
