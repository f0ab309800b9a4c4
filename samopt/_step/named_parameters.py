"""Parameters by name, and the rules behind ``only="norm"``, ``"bias"`` and ``"head"``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["NamedParameter", "find_head", "is_bias", "is_norm", "named_parameters"]

_NORM = re.compile("(batch|layer|group|instance|rms)_?norm", re.IGNORECASE)
_BIAS = re.compile(r"(^|_)bias$|^bias_[ih]h_l\d")  # the last is how recurrent layers call theirs
_HEAD = re.compile("^(classifier|score|fc|heads?)$|_head$")
_HEAD_METHODS = ("get_output_embeddings", "get_classifier")  # of transformers, and of timm
_ADVICE = 'name the parameters with a regular expression, as in only=r"^fc\\."'
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # what torch calls a module that it wraps


class NamedParameter(NamedTuple):
    """A parameter, one of its names, and the module that it is registered in; None where only the name is known."""

    name: str
    parameter: Tensor
    owner: nn.Module | None


def named_parameters(models: Sequence[nn.Module]) -> Iterator[NamedParameter]:
    """Yield every parameter under each of its names: a tied one has several.

    The names are those of the model itself: what DDP, ``torch.compile`` and activation checkpointing put before a name
    is left out.

    Args:
        models: The modules that the names begin at.
    """
    for model in models:
        yield from _named(model, "", ())


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer by its class's name, or by that of a class it derives from.

    Args:
        module: Any module.
    """
    return any(_NORM.search(kind.__name__) for kind in type(module).__mro__)


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias by the last part of its name.

    Args:
        name: Its name.
    """
    return _BIAS.search(name.rpartition(".")[2]) is not None


def find_head(models: Sequence[nn.Module]) -> nn.Module:
    """Return the last layer of a model.

    Args:
        models: The modules of ``model=``.

    Raises:
        ValueError: If it cannot be told which module that is.
    """
    owners = [model for model in models if _has_parameters(model)]
    if len(owners) != 1:
        found = ", ".join(type(model).__name__ for model in owners)
        raise ValueError(
            f'only="head" needs one model with parameters, but model= has {len(owners)}: {found}; {_ADVICE}'
        )
    return _head_in(_unwrapped(owners[0]))


def _head_in(model: nn.Module) -> nn.Module:
    """Return the head that a model declares, or a child that is named like one, or its last module."""
    for method in _HEAD_METHODS:
        getter = getattr(model, method, None)
        declared = getter() if callable(getter) else None
        if isinstance(declared, nn.Module) and _has_parameters(declared):
            return declared
        if isinstance(declared, tuple | list):
            raise ValueError(
                f'only="head" is ambiguous: {method}() of {type(model).__name__} returns {len(declared)} modules; '
                f"{_ADVICE}"
            )
    children = {name: child for name, child in model.named_children() if _has_parameters(child)}
    heads = [name for name in children if _HEAD.search(name)]
    if len(heads) > 1:
        raise ValueError(
            f'only="head" is ambiguous: {type(model).__name__} has {", ".join(heads)}; name the one that you mean, or '
            f'all, with a regular expression, as in only=r"^{heads[0]}\\." or only=r"^({"|".join(heads)})\\."'
        )
    if heads:
        return children[heads[0]]
    if len(children) == 1 and not _owns_parameters(model):  # a wrapper: a LightningModule around a network, say
        return _head_in(_unwrapped(*children.values()))
    every: dict[str, nn.Module] = dict(model.named_modules())
    name, last = [(name, module) for name, module in every.items() if _owns_parameters(module)][-1]
    if is_norm(last) or (last is model and children):
        raise ValueError(
            f'only="head" found no head in {type(model).__name__}: none of its children ({", ".join(children)}) is '
            f"named like one, and its last module with parameters, {name or 'itself'}, is a {type(last).__name__}; "
            f"{_ADVICE}"
        )
    return last


def _named(module: nn.Module, prefix: str, above: tuple[nn.Module, ...]) -> Iterator[NamedParameter]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield NamedParameter(prefix + name, parameter, module)
    for name, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            is_wrapped = _wrapped(module) is child
            yield from _named(child, prefix if is_wrapped else f"{prefix}{name}.", (*above, module))


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module that another wraps under a name of torch's, or None."""
    names = ("module",) if isinstance(module, DistributedDataParallel | nn.DataParallel) else _WRAPPED
    return next((child for name in names if (child := module._modules.get(name)) is not None), None)


def _unwrapped(model: nn.Module) -> nn.Module:
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _owns_parameters(module: nn.Module) -> bool:
    """Return whether parameters are registered in a module itself."""
    return any(parameter is not None for parameter in module._parameters.values())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
