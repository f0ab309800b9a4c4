"""Weights and buffers of a model at named positions: what paths between models and landscapes are made of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.weights import unwrap

__all__ = ["State", "state_of"]

State = nn.Module | Mapping[str, Tensor]
"""A model, or its state dict."""


def state_of(source: State, like: nn.Module) -> dict[str, Tensor]:
    """Return a state's tensors by name, those of every parameter of ``like`` among them.

    Args:
        source: A model, perhaps compiled or data-parallel, or a state dict.
        like: The model whose parameters it must have.

    Raises:
        TypeError: If it is neither.
        ValueError: If a parameter is missing, or has another shape or numbers of another kind.
    """
    if isinstance(source, nn.Module):
        source = unwrap(source).state_dict()
    if not isinstance(source, Mapping):
        raise TypeError(f"weights must be a model or a state dict, got {type(source).__name__}")
    wanted = dict(like.named_parameters())
    missing = [name for name in wanted if name not in source]
    if missing:
        raise ValueError(
            f"the weights lack {missing[0]!r} and {len(missing) - 1} more of the {len(wanted)} parameters of "
            f"{type(like).__name__}; they have {', '.join(list(source)[:5])}, ...; give a state dict of this model"
        )
    for name, parameter in wanted.items():
        if source[name].shape != parameter.shape:
            raise ValueError(
                f"{name!r} has shape {list(source[name].shape)} in the weights and {list(parameter.shape)} in the "
                "model; give a state dict of this model"
            )
        _check_numbers(name, source[name], parameter)
    own = {*wanted, *like.state_dict(), *(name for name, _ in like.named_parameters(remove_duplicate=False))}
    unused = [name for name, tensor in source.items() if isinstance(tensor, Tensor) and name not in own]
    if unused:
        warnings.warn(
            f"{len(unused)} of the weights are none of {type(like).__name__}'s, and are not used: "
            f"{', '.join(unused[:4])}{', ...' if len(unused) > 4 else ''}; check that they are of this model",
            stacklevel=2,
        )
    first: dict[int, str] = {}
    for name, parameter in like.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and name in source and not torch.equal(source[name], source[other].to(source[name].device)):
            raise ValueError(
                f"{other!r} and {name!r} are one parameter of {type(like).__name__}, but the weights have two values "
                "for it; untie them in the model, or give the weights of a model that ties them"
            )
    return {name: tensor.detach() for name, tensor in source.items() if isinstance(tensor, Tensor)}


def _check_numbers(name: str, tensor: Tensor, parameter: Tensor) -> None:
    """Refuse numbers that are not the parameter's own: codes of quantised weights, or none at all."""
    if tensor.is_meta:
        raise ValueError(f"{name!r} of the weights is on the meta device and holds no numbers; load them first")
    kinds = [(each.is_floating_point(), each.is_complex()) for each in (tensor, parameter)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{name!r} holds {tensor.dtype} numbers in the weights and {parameter.dtype} ones in the model; give "
            "dequantized weights of this model"
        )
