"""Trainers in which a second pass would be wrong, found before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING

from samopt import SharpnessAwareOptimizer

from ..accelerate.refusals import refuse_unsupported_parallelism
from .arguments import SAMArguments

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["refuse_unsupported"]

_STEPPED_IN_BACKWARD = ("lomo", "adalomo")
_RUN_IN_A_STEP = ("training_step", "get_batch_samples", "_prepare_inputs", "compute_loss")


def refuse_unsupported(trainer: Trainer, arguments: SAMArguments) -> None:
    """Raise if a second pass cannot be run in this Trainer.

    Args:
        trainer: A constructed Trainer.
        arguments: Its sharpness-aware fields; nothing is refused where they ask for nothing.

    Raises:
        ValueError: If it cannot; the message has the reason.
    """
    if arguments.sam == "none":
        return
    name = type(trainer).__name__
    refuse_unsupported_parallelism(trainer.accelerator, name)
    if isinstance(trainer.optimizer, SharpnessAwareOptimizer):
        given, inner = type(trainer.optimizer).__name__, type(trainer.optimizer.base_optimizer).__name__
        raise ValueError(
            f"{name} puts its own optimizer around the one it is given, and was given {given} around {inner}; pass the "
            'inner one, or use sam="none"'
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer is None and (optim in _STEPPED_IN_BACKWARD or optim.endswith("layerwise")):
        raise ValueError(
            f'{name} cannot run a second pass with optim="{optim}", which moves the weights during the backward pass, '
            "before the second one could start; choose an optimizer that steps after it"
        )
    if trainer.accelerator.scaler is not None and (arguments.sam == "fisher-sam" or arguments.sam_geometry == "fisher"):
        raise ValueError(
            f"{name} cannot take the Fisher geometry under a GradScaler, which multiplies the gradients that the "
            "geometry is made of; use bf16=True, or another geometry"
        )
    path = next(_paths_to_generation(type(trainer)), None)
    if path is not None:
        raise ValueError(
            f"{name} generates text in its training step ({' -> '.join(path)}), so the second pass would draw new "
            "text from the perturbed model instead of seeing the first pass's batch again; train it without sam"
        )


def _paths_to_generation(kind: type) -> Iterator[tuple[str, ...]]:
    """Yield chains of methods by which a training step reaches a call of ``generate``, read from their code.

    Methods of transformers itself are not followed: none of its trainers generates while training.
    """
    seen: set[str] = set()
    paths: list[tuple[str, ...]] = [(name,) for name in _RUN_IN_A_STEP]
    while paths:
        path = paths.pop(0)
        name = path[-1]
        if name in seen:
            continue
        seen.add(name)
        for called in _names_in(kind, name):
            if called == "generate":
                yield (*path, called)
            else:
                paths.append((*path, called))


def _names_in(kind: type, name: str) -> Iterator[str]:
    """Yield the attribute names that the method ``name`` uses, in every class that overrides transformers' own."""
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in ("transformers", "samopt"):
            continue
        method = inspect.unwrap(owner.__dict__[name]) if callable(owner.__dict__.get(name)) else None
        code = getattr(method, "__code__", None)
        if code is not None:
            yield from _names_of(code)


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)
