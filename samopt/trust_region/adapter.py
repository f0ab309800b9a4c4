"""A PEFT model without its adapters: the pretrained model, at no cost in memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

__all__ = ["adapter_parameters", "without_adapters"]

_PROMPTS = "prompt_encoder."


def adapter_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters that ``without_adapters`` takes out of play.

    Args:
        model: Any module.
    """
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if _is_adapter(module))
    names = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    if hasattr(model, "peft_config"):
        names |= {name for name, _ in model.named_parameters() if name.startswith(_PROMPTS)}
    return names


@contextmanager
def without_adapters(model: nn.Module) -> Generator[None]:
    """Switch every PEFT adapter of ``model`` off inside the context; a model without any is left alone.

    The adapters' own dropout still draws its masks, so that the masks after it stay those of the training pass.

    Args:
        model: Any module, a PEFT model or one that adapters were added to.
    """
    layers: list[Any] = [module for module in model.modules() if _is_adapter(module)]
    if not layers and not hasattr(model, "peft_config"):
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    disable_adapter: Any = getattr(model, "disable_adapter", None)
    with ExitStack() as stack:
        stack.callback(_restore, flags)
        if disable_adapter is not None:
            stack.enter_context(disable_adapter())
        else:
            for layer in layers:
                stack.callback(layer.enable_adapters, True)
                layer.enable_adapters(False)
        for layer in layers:
            if hasattr(layer, "lora_dropout"):
                stack.callback(layer.register_forward_hook(_draw_dropout).remove)
        yield


def _is_adapter(module: nn.Module) -> bool:
    """Return whether ``module`` is one of PEFT's layers, by the two members that all of them have."""
    return isinstance(getattr(module, "disable_adapters", None), bool) and hasattr(module, "enable_adapters")


def _draw_dropout(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    """Draw the masks that the adapter would have drawn after the base layer."""
    for name in layer.active_adapters:
        if name in layer.lora_dropout:
            layer.lora_dropout[name](args[0])


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)
