"""Batches and losses by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.batches import fresh, refuse_no_batches
from samopt.sharpness._measuring.losses import LossFn, as_loss_fn, cross_entropy, hf_loss, split_batch
from samopt.sharpness.cli.errors import CommandError, explained
from samopt.sharpness.cli.names import called, named_object

__all__ = ["inputs_and_labels", "load_batches", "load_loss"]

_LOSSES: dict[str, LossFn] = {"cross_entropy": cross_entropy, "hf": hf_loss}


def load_batches(option: str, text: str, arguments: Mapping[str, Any], count: int) -> list[Any]:
    """Return the first batches of what ``module:name`` names.

    Args:
        option: The option it was given to, for messages.
        text: A function that returns an iterable of batches, or an iterable itself.
        arguments: For the function.
        count: How many at most, >= 1.

    Raises:
        CommandError: If there are none.
    """
    if count < 1:
        raise CommandError(f"--batches must be at least 1, got {count}")
    found = named_object(option, text)
    if arguments and not callable(found):
        raise CommandError(
            f"{option} {text} is {type(found).__name__}, no function, so {option}_args would do nothing; name a "
            "function, or leave them out"
        )
    produced = called(option, text, found, arguments) if callable(found) else found
    with explained(f"{option} {text}"):
        refuse_no_batches(produced)
    try:
        iterator = iter(produced)
    except TypeError as error:
        raise CommandError(
            f"{option} {text} must return an iterable of batches, got {type(produced).__name__}"
        ) from error
    batches = [fresh(batch) for batch in itertools.islice(iterator, count)]  # one memory may serve them all
    if not batches:
        raise CommandError(f"{option} {text} gave no batch")
    return batches


def load_loss(text: str, model: nn.Module, batch: Any) -> LossFn:
    """Return a loss by name.

    Args:
        text: "auto", "cross_entropy", "hf", or ``module:name`` of a function ``loss(model, batch)``, or of a torch loss
            such as "torch.nn:CrossEntropyLoss".
        model: A model it is for.
        batch: A batch it is for: "auto" takes the model's own loss where a transformers model meets a mapping.

    Raises:
        CommandError: If there is none.
    """
    if text == "auto":
        is_hf = isinstance(batch, Mapping) and "labels" in batch and hasattr(model, "config")
        return hf_loss if is_hf else cross_entropy
    if text in _LOSSES:
        return _LOSSES[text]
    found = named_object("--loss", text)
    loss = called("--loss", text, found, {}) if inspect.isclass(found) else found
    try:
        return as_loss_fn(loss)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--loss {text}: {error}") from error


def inputs_and_labels(model: nn.Module, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """Return all inputs and labels of batches that hold one tensor of each.

    Args:
        model: The model, for its device.
        batches: The batches.

    Raises:
        CommandError: If they do not.
    """
    pairs = []
    for batch in batches:
        try:
            inputs, labels = split_batch(model, batch)
        except TypeError as error:
            raise CommandError(f"a measure of the data needs inputs and labels: {error}") from error
        if isinstance(inputs, Mapping):
            tensors = [part for part in inputs.values() if isinstance(part, Tensor) and part.is_floating_point()]
            inputs = tensors[0] if len(tensors) == 1 else None
        if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
            raise CommandError("a measure of the data needs inputs that are one tensor of numbers, and labels")
        pairs.append((inputs, labels))
    return torch.cat([inputs for inputs, _ in pairs]), torch.cat([labels for _, labels in pairs])
