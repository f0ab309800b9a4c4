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
        logits: Shape ``(..., classes)``.
    """
    wide = logits if logits.dtype is torch.float64 else logits.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    scale = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return centred / scale.clamp_min(torch.finfo(scale.dtype).tiny)


@contextmanager
def normalized_logits(model: nn.Module) -> Generator[None]:
    """Let the model return normalised logits inside this context.

    Args:
        model: Returns a tensor of logits, or an output with ``logits`` and no loss.
    """
    handle = model.register_forward_hook(_hook)
    try:
        yield
    finally:
        handle.remove()


def _hook(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
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
