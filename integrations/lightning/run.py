"""Both passes of every optimizer step of one fit."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from samopt import SharpnessAwareOptimizer, StepMetrics
from samopt._step.window import MicroBatch
from samopt.distributed import unsynced

from .._second_pass.batch_copies import independent_copy
from .module_state import module_state
from .unreported import unreported

__all__ = ["Run"]


@dataclass(frozen=True)
class _Call:
    """One call of the training step, with arguments of its own, as one of ``parts`` of a window."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: int


class Run:
    """Remembers the training steps of an accumulation window, and repeats them at ``w + epsilon``.

    From ``install`` to ``remove`` every call of the strategy's training step is remembered with a copy of its batch and
    the random state before it. The trainer steps the base optimizer, and knows of no other. In one pass there is
    nothing to repeat.

    Args:
        trainer: The trainer, whose strategy is set up.
        module: The module in training.
        optimizer: The optimizer around the trainer's.
        sync_perturbation: With several processes: perturb along the averaged gradient instead of each process's own.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, optimizer: SharpnessAwareOptimizer, *, sync_perturbation: bool
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._optimizer = optimizer
        self._passes = optimizer.two_passes
        # Shards of a gradient belong together, so that sharded parameters have one perturbation.
        is_sharded = any(hasattr(parameter, "device_mesh") for parameter in module.parameters())
        synced = sync_perturbation or optimizer.sync_perturbation or is_sharded
        self._per_rank = trainer.world_size > 1 and not synced
        if synced and self._passes is not None:
            self._passes.share_perturbation()
        self._strategy = trainer.strategy
        self._training_step = self._strategy.training_step
        self._scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
        self._scale: Tensor | None = None  # what the latest gradients were multiplied by
        self._latest: MicroBatch | None = None
        self._window: list[MicroBatch] = []
        self._until_backward_ends = ExitStack()
        self._is_prepared = True
        self.is_second_pass = False
        """Whether the second pass is running."""

    @property
    def last_step(self) -> StepMetrics:
        """The optimizer's measurements, with gradient norms that no ``GradScaler`` has multiplied."""
        step = self._optimizer.last_step
        if self._scale is None:
            return step
        norms: dict[str, Any] = {"perturbed_grad_norm": step.perturbed_grad_norm}
        if self._base_unscales:
            norms["grad_norm"] = step.grad_norm
        scale = self._scale
        return replace(step, **{name: norm if norm is None else norm / scale for name, norm in norms.items()})

    def install(self) -> None:
        """Take part in the trainer's steps."""
        self._strategy.training_step = self._run_once  # type: ignore[method-assign]  # restored by ``remove``
        base = self._optimizer.base_optimizer
        self._handles = [base.register_step_pre_hook(self._before_step), base.register_step_post_hook(self._after_step)]

    def remove(self) -> None:
        """Take no part in them any more."""
        self._until_backward_ends.close()
        vars(self._strategy).pop("training_step", None)
        for handle in self._handles:
            handle.remove()
        self._latest, self._window = None, []

    def gradients_cleared(self) -> None:
        """Note that the gradients were cleared: a window begins with the latest training step."""
        self._window = []

    def backward_begins(self) -> None:
        """Note that the latest training step is differentiated, and so belongs to the window."""
        if self._latest is not None:
            self._window.append(self._latest)

    def backward_ended(self) -> None:
        """Note that the latest training step has been differentiated."""
        self._until_backward_ends.close()
        if self._passes is not None and self._window and self._trainer.accumulate_grad_batches > 1:
            self._passes.end_micro_batch()

    def replace_gradients(self, optimizer: Optimizer) -> None:
        """Replace the accumulated gradients of a window by those at ``w + epsilon``.

        Args:
            optimizer: The trainer's optimizer.
        """
        window, self._window = self._window, []
        if self._passes is None:
            self._is_prepared = False
            if self._scaler is None:  # Lightning steps for sure, and its closure runs after the step's hooks
                self._before_step()
            return
        if not window or (self._scaler is not None and self._latest is None):
            return  # there is nothing to step, or Lightning will not do so
        one = torch.ones((), device=self._strategy.root_device)
        self._scale = None if self._scaler is None else self._scaler.scale(one)
        has_run = self._passes.run_again(window, self._exchange, self._unreported)
        self._is_prepared = False
        if self._scaler is None:
            self._before_step()
        elif has_run and not self._base_unscales:
            self._scaler.update(
                self._scaler.get_scale()
            )  # forgets that it has unscaled the gradients of the first pass
            self._scaler.unscale_(optimizer)

    @property
    def _base_unscales(self) -> bool:
        return getattr(self._optimizer.base_optimizer, "_step_supports_amp_scaling", False)

    def _before_step(self, *_: Any) -> None:
        """Tell the optimizer that its base steps; called again, or where nothing was delivered, this does nothing."""
        if not self._is_prepared:
            self._is_prepared = True
            self._optimizer.prepare_base_step()

    def _after_step(self, *_: Any) -> None:
        """Refuse a step of the base with a window's first gradients, for which no second pass ran."""
        if self._window:
            self._window = []
            raise RuntimeError(
                f"{type(self._module).__name__} stepped its optimizer in a way that Lightning does not see, so the "
                "second pass was left out, and this step was made without the perturbation (and without clipping); "
                "call optimizer.step(closure=closure) in optimizer_step on the optimizer that it is given, not on the "
                "one inside"
            )

    def _run_once(self, *args: Any, **kwargs: Any) -> Any:
        if self._passes is None:
            return self._training_step(*args, **kwargs)
        parts = self._trainer.accumulate_grad_batches
        call = _Call(independent_copy(args), independent_copy(kwargs), parts)
        # Lightning clears the gradients after the training step, so what a step that was left out left is still here.
        is_first = not self._window or self._trainer.fit_loop.epoch_loop.batch_idx % parts == 0
        if is_first:
            self._window = []
            self._passes.include(*module_state(self._module))
        start = self._passes.begin_micro_batch(is_first=is_first)
        stays_on_rank = self._per_rank and self._passes.keeps_on_rank([self._called])
        self._until_backward_ends.enter_context(self._exchange(not stays_on_rank))
        output = self._training_step(*args, **kwargs)
        loss = _loss_in(output, call)
        if loss is None:
            self._latest = None
            self.backward_ended()
        else:
            self._latest = MicroBatch(functools.partial(self._run_again, call), loss.detach(), start)
        return output

    def _run_again(self, call: _Call) -> Tensor:
        with torch.enable_grad():
            loss = _loss_in(self._training_step(*call.args, **call.kwargs), call)
            if loss is None:
                return torch.tensor(torch.nan, device=self._strategy.root_device)
            scaled = loss if self._scaler is None else self._scaler.scale(loss)
            self._strategy.precision_plugin.backward(scaled, self._module, self._optimizer.base_optimizer)
            self._module.on_after_backward()  # which may mask gradients
        return loss

    def _exchange(self, exchanged: bool) -> AbstractContextManager[None]:
        """Return the context in which processes do or do not exchange gradients."""
        return nullcontext() if exchanged else unsynced(self._called)

    @property
    def _called(self) -> Module:
        """What the strategy calls: the module, or DDP around it."""
        return self._module if self._strategy.model is None else self._strategy.model

    @contextmanager
    def _unreported(self) -> Generator[None]:
        """Let nothing that is run in this context be logged, printed or profiled."""
        self.is_second_pass = True
        try:
            with unreported(self._trainer, self._module):
                yield
        finally:
            self.is_second_pass = False


def _loss_in(output: Any, call: _Call) -> Tensor | None:
    """Return the loss as Lightning differentiates it; None where the step is skipped."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss / call.parts if isinstance(loss, Tensor) else None
