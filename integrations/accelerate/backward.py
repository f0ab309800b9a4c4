"""The second pass in a training loop of your own around ``accelerate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

try:
    from accelerate import Accelerator  # type: ignore[import-untyped]  # accelerate ships no types
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    if error.name != "accelerate":
        raise
    raise ImportError(
        "samopt.integrations.accelerate needs accelerate, which is not installed; install it with: "
        'pip install "samopt[hf]"'
    ) from error

from samopt import SharpnessAwareOptimizer
from samopt.rho_scheduler import schedule_of

from .._second_pass.accumulation import TwoPasses
from .._second_pass.batch_copies import independent_copy
from ..accelerate.refusals import refuse_unsupported_parallelism

__all__ = ["SharpnessAwareBackward"]


class SharpnessAwareBackward:
    """Stands in for ``accelerator.backward``: makes both passes, accumulated as the accelerator says.

    Forward and backward of a micro-batch happen inside the call; at the last micro-batch of a window all of them are
    run again at the perturbed weights, with the same dropout masks. Clipping, ``optimizer.step()``, the scheduler and
    ``zero_grad()`` stay in the loop as they are.

    Cost: two forward-backward passes a step, one transient copy of the weights, and a copy of a window's inputs.

    Args:
        accelerator: The accelerator.
        model: The prepared model.
        optimizer: The prepared optimizer: ``accelerator.prepare(samopt.SAM(base, model=model))``.
        sync_perturbation: With several processes: perturb along the averaged gradient, for one more exchange of
            gradients; by default each process perturbs along its own.

    Raises:
        TypeError: If the optimizer is not a prepared sharpness-aware one.
        ValueError: If the optimizer has no ``model``, or the kind of parallelism cannot run a second pass.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        *,
        sync_perturbation: bool = False,
    ) -> None:
        name = type(self).__name__
        refuse_unsupported_parallelism(accelerator, name)
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(optimizer, AcceleratedOptimizer) or not isinstance(inner, SharpnessAwareOptimizer):
            found = type(optimizer).__name__ + ("" if inner is None else f" of {type(inner).__name__}")
            raise TypeError(
                f"{name} needs a sharpness-aware optimizer that accelerate has prepared, got {found}; write optimizer "
                "= accelerator.prepare(samopt.SAM(base_optimizer, model=model))"
            )
        if inner.model is None:
            raise ValueError(
                f"{name} needs an optimizer that knows its model, got {type(inner).__name__} without one: the second "
                "pass would count twice in BatchNorm's statistics; write "
                f"samopt.{type(inner).__name__}(base_optimizer, model=model)"
            )
        self.optimizer: SharpnessAwareOptimizer = inner
        """The optimizer inside the prepared one, for its ``last_step``."""
        self._scheduled: int | None = None
        self._accelerator = accelerator
        self._passes = TwoPasses(
            accelerator,
            inner,
            model,
            sync_perturbation=sync_perturbation,
            kept=lambda: (accelerator._models, ()),  # the loss may depend on models that other optimizers train
        )

    def __call__(self, compute_loss: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Compute a micro-batch's loss and its gradients, and after the last of a window those of the second pass.

        Args:
            compute_loss: Returns the loss of the micro-batch. It is called again later, so give it the batch as an
                argument: a lambda without arguments would by then see another batch.
            *args: Its arguments, the batch for one.
            **kwargs: Its keyword arguments.

        Returns:
            The first pass's loss, detached.

        Raises:
            RuntimeError: If a ``RhoScheduler`` was stepped inside an accumulation window.
            TypeError: If gradients are accumulated and ``compute_loss`` is given no arguments, or it returns no tensor.
        """
        if self._accelerator.gradient_accumulation_steps > 1 and not args and not kwargs:
            raise TypeError(
                f"{type(self).__name__} got a function without arguments while gradients are accumulated over "
                f"{self._accelerator.gradient_accumulation_steps} batches; it is called again after the last of them, "
                "when the variables it looks up have changed: write backward(compute_loss, batch)"
            )
        self._refuse_schedule_inside_window()
        copied_args, copied_kwargs = independent_copy(args), independent_copy(kwargs)
        losses: list[Tensor] = []

        def differentiate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            loss = compute_loss(*args, **kwargs)
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"{type(self).__name__} needs a function that returns the loss as a tensor, got "
                    f"{type(loss).__name__}; return the loss alone, as in lambda batch: model(**batch).loss"
                )
            self._accelerator.backward(loss)
            losses.append(loss.detach())
            return loss.detach() / int(self._accelerator.gradient_accumulation_steps)

        self._passes.run(lambda: differentiate(args, kwargs), lambda: differentiate(copied_args, copied_kwargs))
        return losses[0]

    def _refuse_schedule_inside_window(self) -> None:
        """Raise if the radius's schedule counts micro-batches: accelerate holds back the learning rate's, not this."""
        schedule, passes = schedule_of(self.optimizer), self.optimizer.two_passes
        if schedule is None or passes is None:
            return
        if passes.window and schedule.last_step != self._scheduled:
            raise RuntimeError(
                "RhoScheduler.step() was called inside an accumulation window, so it would count micro-batches instead "
                "of optimizer steps; accelerate holds back the learning-rate schedulers that it has prepared, but not "
                "this one: write 'if accelerator.sync_gradients: rho_scheduler.step()'"
            )
        self._scheduled = schedule.last_step
