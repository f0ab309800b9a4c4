"""What a Trainer and its subclasses count and collect themselves, so that the second pass leaves it alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from .._second_pass.held_state import held_state

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["own_state"]

_LEFT_ALONE = frozenset(
    {
        "_attached_arguments",
        "_run",
        "accelerator",
        "args",
        "callback_handler",
        "data_collator",
        "eval_dataset",
        "lr_scheduler",
        "model",
        "model_wrapped",
        "optimizer",
        "processing_class",
        "state",
        "train_dataset",
    }
)
"""Attributes of every Trainer that hold no numbers of a training step, or are looked after elsewhere."""

_LOGGED = frozenset({"log_history", "stateful_callbacks"})
"""Attributes of a Trainer's state that grow with the run; the second pass does not log."""


def own_state(trainer: Trainer) -> tuple[list[nn.Module], list[tuple[object, Collection[str]]]]:
    """Return the modules and the objects that a training step of this Trainer may change besides its model.

    The objects are the Trainer, its ``state``, and those of the user's own classes that are reached from its attributes
    (a meter, a dataclass of statistics, the object of a method that is its ``compute_loss_func``).

    Args:
        trainer: Any Trainer.

    Returns:
        The modules (a reference model, a loss with parameters, a torchmetrics metric), and the objects with the names
        of attributes to leave alone.
    """
    values = [value for name, value in vars(trainer).items() if name not in _LEFT_ALONE]
    modules, objects = held_state(trainer, values, known=(trainer, trainer.state, trainer.model))
    return modules, [(trainer, _LEFT_ALONE), (trainer.state, _LOGGED), *objects]
