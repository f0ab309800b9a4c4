"""The loss that a module trains with, as a function of the model and a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from samopt._replay.module_state import ModuleState

from .._second_pass.batch_copies import independent_copy
from .unreported import REPORTS, unreported

__all__ = ["training_loss"]


def training_loss(trainer: Trainer, module: LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    """Return the loss that the module trains with.

    It calls ``training_step`` in the trainer's precision, and leaves no trace of that. What is compiled runs as Python,
    so that nothing is compiled for it, and so that it can be differentiated twice.

    Args:
        trainer: The trainer.
        module: The module.
    """
    takes_index = len(inspect.signature(module.training_step).parameters) > 1

    def loss(model: nn.Module, batch: Any) -> Tensor:
        state = ModuleState([module], ignored=REPORTS)
        state.begin()
        state.save(moving=module.parameters())  # the measure moves them, and the graph holds them
        arguments = (independent_copy(batch), 0) if takes_index else (independent_copy(batch),)
        try:
            with unreported(trainer, module), trainer.precision_plugin.train_step_context(), _uncompiled():
                output = module.training_step(*arguments)
        finally:
            state.restore()
        value = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{type(module).__name__}.training_step returned {type(value).__name__} for a batch that "
                "SharpnessCallback measures on, so there is no loss to perturb; give it loss_fn="
            )
        return value

    return loss


def _uncompiled() -> AbstractContextManager[None]:
    set_stance: Any = getattr(torch.compiler, "set_stance", None)  # older torch has no such thing
    context: AbstractContextManager[None] = nullcontext() if set_stance is None else set_stance("force_eager")
    return context
