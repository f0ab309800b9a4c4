"""What an optimizer asks of the structure of its passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn
from torch.amp.grad_scaler import OptState

from samopt._step.decoupled_update import DecoupledUpdate
from samopt.step_metrics import StepMetrics

__all__ = ["PassHandle", "Passes"]


class PassHandle(Protocol):
    """What ``perturbed()`` yields.

    Attributes:
        loss: Set it to the loss at ``w + epsilon`` to have it in ``last_step``.
    """

    loss: Any


class Passes(Protocol):
    """Where an optimizer is between one update and the next.

    It is one object, shared by anything that copies the optimizer's attributes (as Lightning's wrapper does).
    """

    metrics: StepMetrics
    """What the latest step measured."""

    @property
    def model(self) -> nn.Module | None:
        """The module that the passes run."""

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at ``w + epsilon`` now."""

    @property
    def needs_first_pass(self) -> bool:
        """Whether a gradient at ``w`` has to be taken for this step's ascent."""

    def ascend(self, first_loss: Any = None) -> object:
        """Move the weights to ``w + epsilon``."""

    def restore(self) -> None:
        """Put the weights back, bit for bit; raise if they are not perturbed."""

    def at_perturbed(self, first_loss: Any) -> AbstractContextManager[PassHandle]:
        """Be at ``w + epsilon`` inside the context, exactly at ``w`` after."""

    def first_pass(self) -> AbstractContextManager[None]:
        """Take a gradient that only decides the perturbation in the context; where it may, it stays on its rank."""

    def run(
        self, closure: Callable[[], Any], results: list[Any], ascent_closure: Callable[[], Any] | None = None
    ) -> Any:
        """Leave the gradient at ``w + epsilon`` in place; append what the closure first returned to ``results``."""

    def settle(self, what: str) -> None:
        """Have the weights exact for ``what``, or raise where that would cut a pass short."""

    def require_gradient(self, stage: OptState | None) -> None:
        """Raise unless the gradients may be applied; ``stage`` is how far the calling ``GradScaler`` got."""

    def gradients_cleared(self) -> None:
        """Note that the gradients were cleared."""

    def note_unscaling(self) -> None:
        """Note that a ``GradScaler`` divides the present gradients."""

    def take_beside(self) -> DecoupledUpdate | None:
        """Return what the update does besides the base's step, once; None for nothing."""

    def reset(self) -> None:
        """Be ready for the next pair of passes: the gradients are about to be applied, or were dropped."""
