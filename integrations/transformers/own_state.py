"""What a Trainer and its subclasses count and collect themselves, so that the second pass leaves it alone."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

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

_FRAMEWORKS = frozenset(
    {
        "accelerate",
        "datasets",
        "huggingface_hub",
        "numpy",
        "pandas",
        "peft",
        "pyarrow",
        "samopt",
        "sentence_transformers",
        "tokenizers",
        "torch",
        "transformers",
    }
)
"""Packages whose objects keep no count of training steps: data sets, tokenizers, loaders."""

_LARGE = 1000  # elements; a longer list holds data, not objects that count


def own_state(trainer: Trainer) -> tuple[list[nn.Module], list[tuple[object, Collection[str]]]]:
    """Return the modules and the objects that a training step of this Trainer may change besides its model.

    The objects are the Trainer, its ``state``, and those of the user's own classes that are reached from its attributes
    (a meter, a dataclass of statistics). Tensors and containers in their attributes belong to them.

    Args:
        trainer: Any Trainer.

    Returns:
        The modules (a reference model, a loss with parameters, a torchmetrics metric), and the objects with the names
        of attributes to leave alone.
    """
    modules: list[nn.Module] = []
    objects: list[tuple[object, Collection[str]]] = [(trainer, _LEFT_ALONE), (trainer.state, _LOGGED)]
    pending: list[Any] = [value for name, value in vars(trainer).items() if name not in _LEFT_ALONE]
    seen: set[int] = {id(trainer), id(trainer.state), id(trainer.model)}
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, list | tuple | set | dict | deque):
            if len(value) <= _LARGE:
                pending.extend(value.values() if isinstance(value, dict) else value)
        elif _is_of_the_user(value):
            objects.append((value, ()))
            pending.extend(vars(value).values())
    return modules, objects


def _is_of_the_user(value: Any) -> bool:
    """Return whether an object is of a class that the user, or a package built on Trainer, wrote."""
    if not hasattr(value, "__dict__") or isinstance(value, type) or callable(value) and not _has_state(value):
        return False
    for kind in type(value).__mro__[:-1]:
        package = kind.__module__.partition(".")[0]
        if package in _FRAMEWORKS or (package in sys.stdlib_module_names and package not in ("types", "typing")):
            return False
    return True


def _has_state(value: Any) -> bool:
    """Return whether a callable is an object with attributes, not a function or a method."""
    return type(value).__module__ not in ("builtins", "types", "functools")
