"""Constructor arguments and options, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

__all__ = ["build_base", "check_model", "check_nonnegative"]


def build_base(
    params: ParamsT | Optimizer, base_optimizer: Callable[..., Optimizer] | None, kwargs: dict[str, Any], name: str
) -> Optimizer:
    """Return the optimizer to wrap, from either form of the constructor.

    Args:
        params: An optimizer instance, or parameters.
        base_optimizer: An optimizer class (or factory), with parameters; None with an instance.
        kwargs: Arguments of the class.
        name: The wrapper's name, for messages.

    Returns:
        An optimizer with at least one parameter.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If there are no parameters.
    """
    usage = (
        f"use {name}(torch.optim.SGD(model.parameters(), lr=0.1), rho=...) or "
        f"{name}(model.parameters(), torch.optim.SGD, rho=..., lr=0.1)"
    )
    if isinstance(params, Optimizer):
        if hasattr(params, "base_optimizer"):
            raise TypeError(
                f"{name} cannot wrap {type(params).__name__}, which already wraps "
                f"{type(params.base_optimizer).__name__}; wrap that optimizer instead: {usage}"
            )
        if base_optimizer is not None or kwargs:
            extra = [repr(base_optimizer)] if base_optimizer is not None else []
            extra += [f"{key}=" for key in kwargs]
            raise TypeError(
                f"{name} was given an optimizer instance together with {', '.join(extra)}; arguments of the base go "
                f"to its own constructor: {usage}"
            )
        return params
    if isinstance(params, nn.Module):
        raise TypeError(f"{name} got a module, {type(params).__name__}; write {name}(model.parameters(), ...): {usage}")
    if isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"{name} was given parameters together with an instance of {type(base_optimizer).__name__}; {usage}"
        )
    if base_optimizer is None or not callable(base_optimizer):
        raise TypeError(
            f"{name} needs an optimizer instance, or parameters and an optimizer class; got "
            f"{type(params).__name__} and {base_optimizer!r}; {usage}"
        )
    if isinstance(params, Iterable) and not isinstance(params, Tensor):
        params = list(params)  # type: ignore[assignment]  # ParamsT's three kinds of items stay as they are
        if not params:
            raise ValueError(
                f"{name} got an empty parameter list; a generator such as model.parameters() can be read only once, so "
                "call model.parameters() again for each optimizer"
            )
    return base_optimizer(params, **kwargs)


def check_nonnegative(name: str, value: Any, where: str = "") -> None:
    """Raise unless ``value`` is a finite number >= 0; a tensor is taken as it is, since reading it may wait.

    Args:
        name: Its name, for the message.
        value: The value.
        where: Where it stands, for the message.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative, infinite or nan.
    """
    if isinstance(value, Tensor) or (type(value) is float and 0 <= value < math.inf):
        return
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}{where}")
    if not 0 <= float(value) < math.inf:
        fix = "; use rho=0 to disable the ascent" if "rho" in name else ""
        raise ValueError(f"{name} must be >= 0 and finite, got {value}{where}{fix}")


def check_model(model: nn.Module | None, base: Optimizer, name: str) -> None:
    """Raise unless ``model`` is None or a module with some of the base optimizer's parameters.

    Args:
        model: The module.
        base: The base optimizer.
        name: The wrapper's name, for the message.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it has none of the parameters.
    """
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimized = {id(p) for group in base.param_groups for p in group["params"]}
    if not any(id(parameter) in optimized for parameter in model.parameters()):
        raise ValueError(
            f"{name} was given model={type(model).__name__}, but none of its parameters is among the "
            f"{len(optimized)} that the base optimizer updates; build the base optimizer from this model's parameters, "
            "after any step that replaces them"
        )
