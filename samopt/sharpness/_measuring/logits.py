"""Logits of a common scale, so that models which differ in nothing else are equally sharp."""

from __future__ import annotations

from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["normalize_logits", "normalized_logits"]


def normalize_logits(logits: Tensor) -> Tensor:
    """Return ``(f - mean f) / rms(f - mean f)`` over the last dimension, in at least fp32.

    Args:
        logits: Shape ``(..., classes)``, with two classes or more.

    Raises:
        ValueError: If there is one class only, whose normalised logit would always be 0.
    """
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"normalised logits need two classes or more in the last dimension, got shape {list(logits.shape)}; leave "
            "normalize_logits out for one output per example, or write the logits of both classes, 0 and the output"
        )
    wide = logits if logits.dtype is torch.float64 else logits.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    scale = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return centred / scale.clamp_min(torch.finfo(scale.dtype).tiny)


@contextmanager
def normalized_logits(model: nn.Module, *, has_labels: bool = False) -> Generator[None]:
    """Let the model return normalised logits inside this context.

    Args:
        model: Returns a tensor of logits, or an output with ``logits`` and no loss.
        has_labels: Whether the loss is one of outputs and labels, in which the second dimension may be the classes'.

    Raises:
        ValueError: If the model was not called itself, or which dimension is the classes' is not known.
    """
    calls = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return _normalized(module, output, has_labels)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise ValueError(
            f"normalize_logits changed nothing: loss_fn calls parts of {type(model).__name__}, or its forward, but not "
            "the model itself; call model(...), or normalise inside loss_fn with sharpness.normalize_logits"
        )


def _normalized(module: nn.Module, output: Any, has_labels: bool) -> Any:
    if isinstance(output, Tensor):
        if output.dim() != 2 and has_labels:
            raise ValueError(
                f"normalize_logits is over the classes, but which dimension of the outputs' shape {list(output.shape)} "
                "they are in is not known; write loss_fn(model, batch), with sharpness.normalize_logits over the last "
                "dimension in it"
            )
        return normalize_logits(output)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not isinstance(output, MutableMapping | dict):
        raise TypeError(
            f"normalize_logits needs a model that returns a tensor of logits or an output with logits, but "
            f"{type(module).__name__} returned {type(output).__name__}; normalise inside loss_fn with "
            "sharpness.normalize_logits"
        )
    if output.get("loss") is not None:
        raise ValueError(
            f"normalize_logits came too late: {type(module).__name__} computed its loss from its own logits; call it "
            "without labels in loss_fn, and compute the loss from output.logits"
        )
    output["logits"] = normalize_logits(logits)
    return output
