"""The sharpness-aware optimizer of one training run, from the base optimizer to the last step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]  # accelerate ships no types
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from samopt import RhoScheduler, SharpnessAwareOptimizer

from .._logging.step_metrics import free_metrics
from .._second_pass.accumulation import TwoPasses
from .arguments import SAMArguments
from .checkpoint import CheckpointEntry
from .own_state import own_state

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["Run"]


class Run:
    """What lives from the creation of a Trainer's optimizer to the end of training.

    The optimizer around the base is made at the first step, when the wrapped model is known and a checkpoint has been
    loaded. Its options are those of the arguments and of the user's own parameter groups, not those of a checkpoint: a
    run that is resumed with another ``sam_rho`` uses that one.

    Args:
        arguments: The sharpness-aware fields.
        optimizer: The Trainer's optimizer, prepared or not.
        previous: The run before in the same Trainer, if there was one.

    Attributes:
        optimizer: The sharpness-aware optimizer; None before the first step.
        is_in_step: Whether a training step is running.
    """

    def __init__(self, arguments: SAMArguments, optimizer: Optimizer, previous: Run | None = None) -> None:
        self.optimizer: SharpnessAwareOptimizer | None = None
        self._arguments = arguments
        self._base = _unwrapped(optimizer)
        self._groups = [{key: group[key] for key in group if key != "params"} for group in self._base.param_groups]
        self._entry = CheckpointEntry(self._base)
        if previous is not None:
            previous._end()
            if previous._base is self._base:  # its groups have our options by now, and these are not the user's
                self._groups = previous._groups
        self._handle: RemovableHandle | None = None
        self._passes: TwoPasses | None = None
        self._schedule: RhoScheduler | None = None
        self._first_perturbed = 0
        self._gradient_scale: Tensor | None = None
        self._is_prepared = False
        self.is_in_step = False

    def step(
        self, trainer: Trainer, model: nn.Module, once: Callable[[], Tensor], again: Callable[[], Tensor]
    ) -> Tensor:
        """Run a micro-batch's first pass and, if it is the last of a window, the window's second pass.

        Args:
            trainer: The Trainer.
            model: The wrapped model.
            once: Forward and backward of the micro-batch; returns the loss as differentiated.
            again: The same, for the second pass.

        Returns:
            The first pass's loss.
        """
        if self._passes is None:
            self._passes = self._start(trainer, model)
        self._follow_schedule(trainer.state.global_step)
        self._passes.optimizer.is_paused = trainer.state.global_step < self._first_perturbed
        self._is_prepared = False
        self.is_in_step = True
        try:
            loss = self._passes.run(once, again)
        finally:
            self.is_in_step = False
        scaler = trainer.accelerator.scaler
        if scaler is not None and not self._passes.optimizer.is_one_pass:  # in one pass, norms are measured later
            self._gradient_scale = scaler.scale(torch.ones((), device=loss.device))
        return loss

    def metrics(self) -> dict[str, float]:
        """Return what the latest step measured, as values for logs; empty before the first step."""
        return {} if self.optimizer is None else free_metrics(self.optimizer.last_step, self._gradient_scale)

    def _start(self, trainer: Trainer, model: nn.Module) -> TwoPasses:
        optimizer = self._arguments.build_optimizer(self._base, self._models(trainer, model), trainer.args.seed)
        self._entry.belongs_to(optimizer)
        self._handle = self._base.register_step_pre_hook(self._prepare)
        for group, own in zip(optimizer.param_groups, self._groups, strict=False):
            for name in (optimizer.radius.option, "eta", "perturb"):
                key = optimizer.option_key(name)
                group[key] = own.get(key, optimizer.option({}, name))
        self._schedule = self._arguments.build_schedule(
            optimizer, max_steps=trainer.state.max_steps, learning_rate=trainer.args.learning_rate
        )
        self._first_perturbed = self._arguments.first_perturbed_step(trainer.state.max_steps)
        self.optimizer = optimizer
        return TwoPasses(
            trainer.accelerator,
            optimizer,
            model,
            sync_perturbation=self._arguments.sam_sync_perturbation,
            kept=functools.partial(own_state, trainer),
        )

    def _models(self, trainer: Trainer, model: nn.Module) -> nn.Module | list[nn.Module]:
        """Return the model, with the modules beside it whose parameters the optimizer has: losses with weights."""
        if self._arguments.sam in ("tram", "functional-sam"):  # which take the outputs of one module
            return model
        trained = {parameter for group in self._base.param_groups for parameter in group["params"]}
        trained -= set(model.parameters())
        beside = [module for module in own_state(trainer)[0] if not trained.isdisjoint(module.parameters())]
        return [model, *beside] if beside else model

    def _prepare(self, *_: object) -> None:
        """Have the base step with the second pass's gradient; called again where its ``step`` calls its parent's."""
        if self.optimizer is not None and not self._is_prepared:
            self._is_prepared = True
            self.optimizer.prepare_base_step()

    def _end(self) -> None:
        self._entry.remove()
        if self._handle is not None:
            self._handle.remove()

    def _follow_schedule(self, step: int) -> None:
        schedule = self._schedule
        if schedule is None:
            return
        schedule.load_state_dict({"last_step": step, "base_rhos": schedule.base_rhos})
        if step % self._arguments.sam_every:
            key = schedule.optimizer.option_key(schedule.optimizer.radius.option)
            for group in schedule.optimizer.param_groups:
                group[key] = 0.0


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
