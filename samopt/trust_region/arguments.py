"""What a forward call received, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from samopt._replay.unwrap import original

__all__ = ["is_encoder_decoder", "named_arguments", "predicts_next_token", "without_labels"]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call under the names that ``forward`` gives them.

    The entries of a mapping given as an argument (a batch) are included; explicit arguments come first.

    Args:
        module: What was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    try:
        bound = inspect.signature(original(module).forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {}
    named: dict[str, Any] = {}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Mapping):
            named |= {key: entry for key, entry in value.items() if isinstance(key, str)}
    return named | dict(bound) | kwargs


def without_labels(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without ``labels`` where a Hugging Face model would only compute a loss from them.

    That loss holds a second fp32 copy of the logits. Encoder-decoder models make their decoder's inputs from the
    labels and keep them.

    Args:
        module: What is called.
        kwargs: Its keyword arguments.
    """
    if "labels" not in kwargs or not hasattr(original(module), "config") or is_encoder_decoder(module):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != "labels"}


def is_encoder_decoder(module: nn.Module) -> bool:
    """Return whether a Hugging Face configuration says that the model has an encoder and a decoder.

    Args:
        module: Any module.
    """
    return bool(getattr(getattr(original(module), "config", None), "is_encoder_decoder", False))


def predicts_next_token(module: nn.Module) -> bool:
    """Return whether the label of position t + 1 belongs to the logits of position t, as in causal language models.

    Hugging Face models say so by their ``loss_type``; those without one are causal where they can generate.

    Args:
        module: Any module.
    """
    model = original(module)
    if not hasattr(model, "config") or is_encoder_decoder(module):
        return False
    kind = getattr(model, "loss_type", None)
    if kind is not None:
        return kind in ("ForCausalLM", "ForConditionalGeneration")
    can_generate: Any = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate())
