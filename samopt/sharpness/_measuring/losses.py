"""Ready losses for the batches people have: (inputs, labels), or keyword arguments of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from samopt.sharpness._measuring.batches import map_tensors

__all__ = ["LossFn", "accuracy", "cross_entropy", "hf_loss"]

LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> scalar``: the batch's loss, averaged over its examples."""

_IGNORED = -100  # the label that torch's cross-entropy and Hugging Face's models leave out


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of ``model(inputs)`` against ``labels``, in at least fp32.

    Args:
        model: Returns logits of shape ``(n, classes, ...)``.
        batch: ``(inputs, labels)``, moved to the model's device; further entries are not used.

    Raises:
        TypeError: If the batch is no such pair.
    """
    inputs, labels = _pair(model, batch)
    logits = model(inputs)
    return functional.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), labels)


def hf_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a Hugging Face model computes from a batch with labels.

    Args:
        model: Returns an output with a ``loss``.
        batch: Keyword arguments of the model, moved to its device.

    Raises:
        ValueError: If the output has no loss.
    """
    output = model(**map_tensors(dict(batch), _mover(model)))
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch with the keys {sorted(batch)}; a batch needs 'labels'"
        )
    return loss


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    """Return the fraction of labels that the largest logit hits, 0-dim; labels of -100 do not count.

    Args:
        model: Returns logits, or an output with ``logits``, whose classes are the last dimension (the second one where
            the labels say so, as in segmentation).
        batch: ``(inputs, labels)``, or a mapping with ``labels``.

    Raises:
        TypeError: If the batch is neither.
    """
    if isinstance(batch, Mapping):
        moved = map_tensors(dict(batch), _mover(model))
        labels = moved.get("labels")
        if not isinstance(labels, Tensor):
            raise TypeError(f"accuracy needs a batch with 'labels', got the keys {sorted(batch)}")
        output = model(**moved)
    else:
        inputs, labels = _pair(model, batch)
        output = model(inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    predictions = logits.argmax(-1 if logits.shape[:-1] == labels.shape else 1)
    counted = labels != _IGNORED
    return ((predictions == labels) & counted).sum() / counted.sum()


def _pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        found = type(batch).__name__ + (f" with {len(batch)} entries" if isinstance(batch, tuple | list) else "")
        raise TypeError(
            f"a batch must be a pair (inputs, labels), got {found}; use sharpness.hf_loss for a Hugging Face batch, or "
            "write loss_fn(model, batch)"
        )
    inputs, labels = map_tensors(tuple(batch[:2]), _mover(model))
    return inputs, labels


def _mover(model: nn.Module) -> Callable[[Tensor], Tensor]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return lambda tensor: tensor.to(device, non_blocking=True)
