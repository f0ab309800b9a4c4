"""The passes of a step whose direction is the batch's gradient, and what may be done between them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.amp.grad_scaler import OptState

from samopt._perturb.gradients import any_nonzero, dense_gradients, propagate_nonfinite
from samopt._perturb.scratch_pool import ScratchPool
from samopt._replay.forward_calls import PassObserver, Replay, RngState
from samopt._step.decoupled_update import DecoupledUpdate
from samopt._step.second_pass import SecondPass
from samopt.distributed import unsynced
from samopt.step_metrics import ZERO, StepMetrics, as_scalar

if TYPE_CHECKING:
    from samopt.optimizer import SharpnessAwareOptimizer

__all__ = ["TWO_WAYS", "TwoPass"]

TWO_WAYS = (
    "Write either 'loss.backward()', 'with optimizer.perturbed(): criterion(model(x), y).backward()', "
    "'optimizer.step()'; or 'optimizer.step(closure)' with a closure that clears the gradients, computes the loss, "
    "calls backward and returns the loss"
)


class TwoPass:
    """Where an optimizer is between first gradient, second gradient and update.

    It is one object, shared by anything that copies the optimizer's attributes (as Lightning's wrapper does).

    Args:
        optimizer: Whose weights, radius and metric the passes use.
        model: The module that the passes run, or None.
        observers: Told when passes begin and end.
    """

    def __init__(
        self, optimizer: SharpnessAwareOptimizer, model: nn.Module | None, observers: Iterable[PassObserver]
    ) -> None:
        self._optimizer: SharpnessAwareOptimizer = weakref.proxy(optimizer)
        self._replay = Replay(model, optimizer.accelerators(), observers)
        self._current: SecondPass | None = None
        self._is_ready = False  # whether the gradients are a second pass's
        self._is_unscaled = False  # whether a GradScaler divided them since that pass began
        self._memory = ScratchPool()
        self._beside: DecoupledUpdate | None = None  # what the update does besides the base's step
        self.metrics = StepMetrics()

    @property
    def model(self) -> nn.Module | None:
        """The module that the passes run."""
        return self._replay.model

    @property
    def is_perturbed(self) -> bool:
        """Whether the second pass is running."""
        return self._current is not None

    @property
    def needs_first_pass(self) -> bool:
        """True: the direction is made from this step's gradient."""
        return True

    def note_unscaling(self) -> None:
        """Note that a ``GradScaler`` divides the present gradients."""
        self._is_unscaled = True

    def gradients_cleared(self) -> None:
        """Note that the gradients are gone, a second pass's that waited for the update included."""
        self._replay.gradients_cleared()
        self._is_ready = False
        self._beside = None

    def require_gradient(self, stage: OptState | None) -> None:
        """Raise unless the gradients are a second pass's, or there is nothing that an ascent would change.

        Args:
            stage: How far the calling ``GradScaler`` got, or None.

        Raises:
            RuntimeError: If the gradients must not be applied.
        """
        optimizer = self._optimizer
        if self._is_ready:
            if stage is OptState.UNSCALED and not self._is_unscaled:
                raise RuntimeError(
                    "the gradients of the second pass are still multiplied by the GradScaler's scale: "
                    "scaler.unscale_(optimizer) was called before the second pass; call it after the 'with "
                    "optimizer.perturbed():' block (the ascent needs no unscaling), or leave it to scaler.step"
                )
        elif optimizer.may_move():
            if any_nonzero(optimizer.param_groups):
                raise RuntimeError(f"step() found gradients but no perturbed pass since the last step. {TWO_WAYS}")
        else:
            self._complete()

    def reset(self) -> None:
        """Forget gradients and records, ready for the next first pass."""
        self._is_ready = False
        self._replay.forget()

    def take_beside(self) -> DecoupledUpdate | None:
        """Return what the update does besides the base's step, once: a base's ``step`` may call its parent's."""
        beside, self._beside = self._beside, None
        return beside

    def first_pass(self) -> AbstractContextManager[None]:
        """Keep the gradients on their rank in the context, if they decide no more than this rank's perturbation."""
        optimizer = self._optimizer
        return nullcontext() if optimizer.sync_perturbation or not optimizer.may_move() else unsynced(self.model)

    def run(
        self, closure: Callable[[], Any], results: list[Any], ascent_closure: Callable[[], Any] | None = None
    ) -> Any:
        """Run both passes.

        Args:
            closure: Computes a gradient and returns its loss.
            results: Gets what the closure returned in the first pass.
            ascent_closure: Must be None.

        Returns:
            What the closure returned in the pass whose gradient is left in place.

        Raises:
            TypeError: If there is an ``ascent_closure``.
        """
        if ascent_closure is not None:
            raise TypeError(
                "step() was given an ascent_closure, but the direction is the gradient that closure computes; use "
                "direction=samopt.parts.direction.ReusedGradient() to take it from another"
            )
        self._replay.forget()
        start = self._replay.capture()
        with torch.enable_grad(), self.first_pass():
            results.append(closure())
        if not self._optimizer.may_move():
            self._replay.forget()
            self.metrics = StepMetrics(loss=as_scalar(results[-1]), asked=ZERO)
            self._complete()
            return results[-1]
        with self.at_perturbed(results[-1], start) as second:
            if not second.is_needed:
                return results[-1]
            with torch.enable_grad():
                second.loss = closure()
        return second.loss

    @contextmanager
    def at_perturbed(self, first_loss: Any, start: RngState | None = None) -> Generator[SecondPass]:
        """Be at ``w + epsilon`` inside this context.

        Args:
            first_loss: What the first pass returned, for the metrics.
            start: Random state at the start of the first pass, where known.

        Yields:
            The pass.
        """
        self.settle("perturbed()")
        failed = True
        try:
            try:
                yield self.ascend(first_loss, start)
                failed = False
            finally:
                self._put_back(failed)
        finally:
            self._put_back(failed)  # does nothing unless an interrupt hit the first one

    def ascend(self, first_loss: Any = None, start: RngState | None = None) -> SecondPass:
        """Take the gradients and move the weights; whatever was done when this is interrupted, leaving undoes.

        Args:
            first_loss: What the first pass returned, for the metrics.
            start: Random state at the start of the first pass, where known.

        Returns:
            The pass.
        """
        self.settle("ascend()")
        optimizer = self._optimizer
        taken, targets = optimizer.take_stock()
        second = SecondPass(
            taken,
            targets,
            optimizer.metric,
            linf=optimizer.norm == "linf",
            backend=optimizer.backend,
            first_loss=first_loss,
            measure_grad_norms=optimizer.measure_grad_norms,
            may_move=optimizer.may_move(),
            keep_gradients=optimizer.combination is not None,
            memory=self._memory,
        )
        self._replay.use_devices(optimizer.accelerators())
        self._is_ready = False
        self._is_unscaled = False
        self._beside = None
        self._current = second
        optimizer.advance_rounding()
        second.enter(self._replay, start, optimizer.rounding_noise())
        return second

    def restore(self) -> None:
        """Put the weights back and keep the second pass's gradients.

        Raises:
            RuntimeError: If the weights are not perturbed.
        """
        if self._current is None:
            raise RuntimeError(
                "restore() was called, but the weights are not perturbed; call ascend() first, or use "
                "'with optimizer.perturbed():', which does both"
            )
        try:
            self._put_back(failed=False)
        finally:
            self._put_back(failed=False)  # does nothing unless an interrupt hit the first one

    def settle(self, what: str) -> None:
        """Raise if the second pass is running.

        Args:
            what: What was called, for the message.

        Raises:
            RuntimeError: If the second pass is running.
        """
        if self._current is not None:
            raise RuntimeError(
                f"{what} was called while the weights are perturbed; leave 'with optimizer.perturbed():' first, or "
                "call restore() after ascend()"
            )

    def _put_back(self, failed: bool) -> None:
        """Undo ``ascend`` and set up what an update needs; a no-op with nothing to undo, so that it can be retried."""
        second = self._current
        if second is None:
            return
        optimizer = self._optimizer
        failed = failed or second.is_spoiled
        if failed:
            optimizer.base_optimizer.zero_grad()
        second.leave(self._replay, failed)
        if not failed:
            if optimizer.may_move() and optimizer.combination is not None:
                self._beside = second.combine(optimizer.combination)
            else:
                self._complete()
            zero_or_nan = second.zero_or_nan()
            if zero_or_nan is not None:
                propagate_nonfinite(zero_or_nan, optimizer.param_groups)
            self.metrics = optimizer.measured(second)
            self._is_ready = True
        self._current = None

    def _complete(self) -> None:
        """Make the base's gradients of those at ``w``, where the combination chose to leave out the second pass."""
        optimizer = self._optimizer
        if optimizer.combination is None or not optimizer.is_on():
            return
        parameters = [parameter for parameter in optimizer.parameters() if parameter.grad is not None]
        if parameters:
            with torch.no_grad():
                optimizer.combination.complete(parameters, dense_gradients(parameters))
