"""Losses for the batches people have: (inputs, labels), dicts with labels, and what a Hugging Face model takes."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from samopt._numerics.devices import to_device
from samopt._numerics.low_precision import is_low_precision
from samopt.sharpness._measuring.batches import LABEL_KEYS, label_key, map_tensors

__all__ = [
    "Loss",
    "LossFn",
    "accuracy",
    "as_loss_fn",
    "copied_with_loss",
    "cross_entropy",
    "has_one_class_each",
    "hf_loss",
    "modules_of",
    "split_batch",
    "takes_labels",
]

LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> scalar``: the batch's loss, averaged over its examples."""

Loss: TypeAlias = LossFn | nn.Module | Callable[[Tensor, Tensor], Tensor]
"""A ``LossFn``; or a loss of outputs and labels, such as ``nn.CrossEntropyLoss()`` or ``functional.mse_loss``."""

_IGNORED = -100  # the label that torch's cross-entropy and Hugging Face's models leave out
_OUTPUT_NAMES = {"input", "inputs", "output", "outputs", "out", "pred", "preds", "prediction", "predictions"} | {
    "logits",
    "y_hat",
    "y_pred",
}
_LABEL_NAMES = {"target", "targets", "label", "labels", "y", "y_true", "truth"}
_MODEL_NAMES = {"model", "module", "net", "network"}


def as_loss_fn(loss: Any) -> LossFn:
    """Return any accepted loss as ``loss_fn(model, batch) -> scalar``.

    A module, and a function whose first two arguments are called like outputs and labels (as all of
    ``torch.nn.functional`` are), is a loss of outputs and labels. Any other function is called with model and batch.

    Args:
        loss: A ``Loss``.

    Raises:
        TypeError: If it is no loss.
        ValueError: If its reduction is not a mean over examples.
    """
    if inspect.isclass(loss):
        raise TypeError(f"loss_fn is the class {loss.__name__}; make an object of it: {loss.__name__}()")
    if not callable(loss):
        raise TypeError(
            f"loss_fn must be a function loss_fn(model, batch) or a torch loss such as nn.CrossEntropyLoss(), got "
            f"{type(loss).__name__}"
        )
    if isinstance(loss, _OutputLoss) or not _takes_outputs_and_labels(loss):
        function: LossFn = loss
        return function
    reduction = getattr(loss, "reduction", None) or getattr(loss, "keywords", {}).get("reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise ValueError(
            f'the loss has reduction="{reduction}", but a measure needs the mean over the examples of a batch; use '
            'reduction="mean"'
        )
    return _OutputLoss(loss)


class _OutputLoss:
    """A loss of outputs and labels, as a function of the model and a batch.

    Args:
        criterion: ``criterion(outputs, labels) -> scalar``.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.criterion = criterion

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = split_batch(model, batch)
        outputs = _logits(model, call_model(model, inputs))
        loss: Tensor
        try:
            # A loss in bf16 has steps of 0.4 %: most rises are smaller.
            loss = self.criterion(_at_least_fp32(outputs), _at_least_fp32(labels))
        except RuntimeError:
            if not is_low_precision(outputs):
                raise
            loss = self.criterion(outputs, labels)  # one whose class weights are in low precision, say
        return loss


def _at_least_fp32(values: Any) -> Any:
    return values.float() if isinstance(values, Tensor) and is_low_precision(values) else values


def modules_of(loss: LossFn) -> list[nn.Module]:
    """Return the loss, or what it is made from, where that is a module, which may have a state or weights.

    Args:
        loss: What ``as_loss_fn`` returned.
    """
    return [part for part in (loss, getattr(loss, "criterion", None)) if isinstance(part, nn.Module)]


def takes_labels(loss: LossFn) -> bool:
    """Return whether a loss compares the model's outputs with labels as torch's losses do: classes second.

    Args:
        loss: What ``as_loss_fn`` returned.
    """
    return isinstance(loss, _OutputLoss) or loss is cross_entropy


def copied_with_loss(model: nn.Module, loss: LossFn, other: Any = None) -> tuple[nn.Module, LossFn, Any]:
    """Return copies of a model, its loss and one more object, which share with each other what they shared before.

    Training a copy must leave the weights and the state of a loss module alone, too.

    Args:
        model: The model.
        loss: What ``as_loss_fn`` returned; copied where it is a module, or is made from one.
        other: An optimizer, or None.
    """
    is_module = bool(modules_of(loss))
    with torch.inference_mode(False):
        twin, copied, further = copy.deepcopy((model, loss if is_module else None, other))
    return twin, copied if copied is not None else loss, further


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of ``model(inputs)`` against ``labels``, in at least fp32.

    Args:
        model: Returns logits of shape ``(n, classes, ...)``, or an output with ``logits`` of shape ``(n, classes)``.
        batch: ``(inputs, labels)`` or a dict with labels, moved to the model's device; further entries of a pair are
            not used.

    Raises:
        TypeError: If the batch has no labels.
    """
    inputs, labels = split_batch(model, batch)
    logits = _logits(model, call_model(model, inputs))
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
        batch: ``(inputs, labels)``, or a mapping with labels: a whole number for each prediction.

    Raises:
        TypeError: If the batch is neither.
        ValueError: If the labels are no classes of the logits, or the model is one that shifts its labels itself.
    """
    logits, labels = _logits_and_labels(model, batch)
    axis = -1 if logits.shape[:-1] == labels.shape else 1
    _check_classes(model, logits, labels, axis)
    predictions = logits.argmax(axis)
    counted = labels != _IGNORED
    hits: Tensor = (predictions == labels) & counted
    fraction: Tensor = hits.sum() / counted.sum()
    return fraction


def _check_classes(model: nn.Module, logits: Tensor, labels: Tensor, axis: int) -> None:
    """Refuse what ``argmax`` would compare with something else than its class."""
    shapes = f"logits of shape {list(logits.shape)} and labels of shape {list(labels.shape)}"
    rest = list(logits.shape)
    classes = rest.pop(axis) if logits.dim() > max(axis, 0) else 1
    if classes < 2:
        raise ValueError(
            f"accuracy takes the largest of two logits or more, got {shapes}; for one output an example write "
            "accuracy_fn(model, batch) with a threshold"
        )
    if labels.is_floating_point() or rest != list(labels.shape):
        raise ValueError(
            f"accuracy needs a whole number for each prediction, got {shapes} and dtype {labels.dtype}; write "
            "accuracy_fn(model, batch) for other labels"
        )
    can_generate = getattr(model, "can_generate", None)
    shifts = callable(can_generate) and can_generate() and not getattr(model.config, "is_encoder_decoder", False)
    if shifts and labels.dim() > 1:
        raise ValueError(
            f"accuracy would compare each token's logits with that token, but {type(model).__name__} predicts the next "
            "one; write accuracy_fn(model, batch) with logits[:, :-1] and labels[:, 1:]"
        )


def has_one_class_each(model: nn.Module, batch: Any) -> bool:
    """Return whether each example has one label, a class of two or more, so that ``accuracy`` means something.

    A language model shifts its labels itself, and an output of its own for each of several labels may be no class.

    Args:
        model: Called once; only what it returns is looked at.
        batch: Any batch.
    """
    try:
        logits, labels = _logits_and_labels(model, batch)
    except (TypeError, AttributeError, RuntimeError, IndexError):  # a batch or an output that ``accuracy`` cannot read
        return False
    return (
        isinstance(labels, Tensor)
        and not labels.is_floating_point()
        and labels.dim() == 1
        and logits.dim() == 2
        and logits.shape[1] > int(labels.max().clamp(min=1))
    )


def _logits_and_labels(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    labels: Any
    if isinstance(batch, Mapping) and "labels" in batch:  # a Hugging Face model may need its labels to run
        moved = map_tensors(dict(batch), _mover(model))
        labels = moved["labels"]
        output = model(**moved) if _accepts(model, moved) else call_model(model, split_batch(model, batch)[0])
    else:
        inputs, labels = split_batch(model, batch)
        output = call_model(model, inputs)
    return (output if isinstance(output, Tensor) else output.logits), labels


def split_batch(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the labels of a batch, moved to the model's device.

    Args:
        model: The model.
        batch: ``(inputs, labels)``, or a mapping with labels.

    Raises:
        TypeError: If there are no labels.
    """
    moved: Any
    if isinstance(batch, Mapping):
        key = label_key(batch)
        if key is None:
            raise TypeError(
                f"a batch that is a mapping needs labels under one of {', '.join(LABEL_KEYS)}, got the keys "
                f"{sorted(map(str, batch))}; write loss_fn(model, batch)"
            )
        moved = map_tensors(dict(batch), _mover(model))
        labels = moved.pop(key)
        return moved, labels
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        found = type(batch).__name__ + (f" with {len(batch)} entries" if isinstance(batch, tuple | list) else "")
        raise TypeError(
            f"a batch must be a pair (inputs, labels), got {found}; use sharpness.hf_loss for a Hugging Face batch, or "
            "write loss_fn(model, batch)"
        )
    inputs, labels = map_tensors(tuple(batch[:2]), _mover(model))
    return inputs, labels


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Return ``model(inputs)``, with the entries of a mapping as keyword arguments where the model takes them.

    Args:
        model: The model.
        inputs: The inputs.
    """
    if isinstance(inputs, Mapping):
        if _accepts(model, inputs):
            return model(**inputs)
        if len(inputs) == 1:
            return model(next(iter(inputs.values())))
    return model(inputs)


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() > 2 and isinstance(output, Mapping):
        raise TypeError(
            f"{type(model).__name__} returned logits of shape {list(logits.shape)}, one row a token, whose labels the "
            "model itself shifts and masks; use sharpness.hf_loss"
        )
    if logits is None and isinstance(output, tuple) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__}, which holds no tensor of outputs for a loss of "
            "outputs and labels; write loss_fn(model, batch)"
        )
    return logits


def _takes_outputs_and_labels(loss: Any) -> bool:
    """Return whether the first two arguments are outputs and labels, rather than a model and a batch."""
    if isinstance(loss, nn.Module):
        return not _positional(type(loss).forward)[1:2] or _positional(type(loss).forward)[1] not in _MODEL_NAMES
    while isinstance(loss, functools.partial):
        loss = loss.func
    names = _positional(loss)
    return len(names) > 1 and names[0] in _OUTPUT_NAMES and names[1] in _LABEL_NAMES


def _positional(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return []
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def _accepts(model: nn.Module, arguments: Mapping[Any, Any]) -> bool:
    """Return whether ``model(**arguments)`` names arguments that its ``forward`` has."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return all(isinstance(name, str) and (takes_any or name in parameters) for name in arguments)


def _mover(model: nn.Module) -> Callable[[Tensor], Tensor]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return lambda tensor: to_device(tensor, device)
