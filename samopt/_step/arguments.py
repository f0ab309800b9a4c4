"""Constructor arguments and options, checked before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt import kernels
from samopt.parts.checks import check_nonnegative
from samopt.parts.combination import Combination
from samopt.parts.direction import Direction, KnownDirection

__all__ = [
    "as_group",
    "build_base",
    "check_combination",
    "check_models",
    "check_option",
    "check_options",
    "check_reuse",
    "refuse_fixed",
]


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
        _refuse_wrapper(params, name, usage)
        if base_optimizer is not None or kwargs:
            extra = [repr(base_optimizer)] if base_optimizer is not None else []
            extra += [f"{key}=" for key in kwargs]
            raise TypeError(
                f"{name} was given an optimizer instance together with {', '.join(extra)}, which {name} does not know "
                f"(help(samopt.{name}) lists its options); arguments of the base go to its own constructor: {usage}"
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
    return _build(base_optimizer, params, kwargs, name, usage)


def check_option(key: str, value: Any, where: str = "") -> None:
    """Raise if an option of a parameter group, or of a constructor, is out of range.

    Args:
        key: Its name; "perturb" is a flag, every other option a number >= 0.
        value: Its value.
        where: Where it stands, for the message.
    """
    if not key.endswith("perturb"):
        check_nonnegative(key, value, where)


def check_options(*, norm: str, backend: str) -> None:
    """Raise if an option of a constructor is unknown.

    Args:
        norm: Kind of ball.
        backend: Kernel backend.

    Raises:
        ValueError: If a name is unknown.
        RuntimeError: If the backend cannot run on this machine.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f'norm must be "l2" or "linf", got {norm!r}')
    kernels.check(backend)


def check_combination(combination: Combination | None, direction: Direction) -> None:
    """Raise unless ``combination`` is None, or can be used with a direction.

    Args:
        combination: What a user gave.
        direction: The direction.

    Raises:
        TypeError: If it is not a combination.
        ValueError: If there is no first gradient for it.
    """
    if combination is None:
        return
    if not isinstance(combination, Combination):
        raise TypeError(
            f"combination must be None or an object from samopt.parts, such as SurrogateGap(); got {combination!r}"
        )
    if isinstance(direction, KnownDirection):
        raise ValueError(
            f"{type(combination).__name__} combines the gradients of two passes, and this direction takes one; use "
            'direction="gradient"'
        )


def check_reuse(
    *, has_choice: bool, models: list[nn.Module], direction: Direction, combination: Combination | None
) -> None:
    """Raise if the other options leave no trunk to reuse, or need more of the first pass than the head's gradient.

    Args:
        has_choice: Whether ``only`` was given.
        models: The modules of ``model=``.
        direction: The direction.
        combination: The combination.

    Raises:
        ValueError: If ``reuse_trunk=True`` does not go with them.
    """
    if not (has_choice and models):
        raise ValueError('reuse_trunk=True needs model= and an only= that chooses the last layer, such as only="head"')
    if isinstance(direction, KnownDirection):
        raise ValueError(
            f"reuse_trunk=True saves a part of the second pass, and {type(direction).__name__} takes one; leave it out"
        )
    if combination is not None:
        raise ValueError(
            f"reuse_trunk=True takes the head's gradient alone at w, but {type(combination).__name__} combines all "
            "gradients of both passes; leave it out"
        )


def check_models(model: nn.Module | Iterable[nn.Module] | None, base: Optimizer, name: str) -> list[nn.Module]:
    """Return the modules that ``model=`` names.

    Args:
        model: A module, several, or None.
        base: The base optimizer.
        name: The wrapper's name, for the message.

    Raises:
        TypeError: If it is something else.
        ValueError: If they have none of the base's parameters.
    """
    if model is None:
        return []
    if isinstance(model, nn.Module):
        models = [model]
    else:
        models = list(model) if isinstance(model, Iterable) and not isinstance(model, str | Tensor) else []
        if not models or not all(isinstance(each, nn.Module) for each in models):
            found = [type(each).__name__ for each in models] or type(model).__name__
            raise TypeError(f"model must be a torch.nn.Module or a list of modules, got {found}")
    optimized = {id(p) for group in base.param_groups for p in group["params"]}
    if not any(id(parameter) in optimized for each in models for parameter in each.parameters()):
        raise ValueError(
            f"{name} was given model={', '.join(type(each).__name__ for each in models)}, but none of its parameters "
            f"is among the {len(optimized)} that the base optimizer updates; build the base optimizer from this "
            "model's parameters, after any step that replaces them"
        )
    return models


def refuse_fixed(optimizer: object, options: dict[str, Any], **instead: str) -> None:
    """Raise if an option was given that a class sets itself.

    Args:
        optimizer: An instance of the class.
        options: What was given.
        **instead: The options that it sets, with what to use instead.

    Raises:
        TypeError: If one was given.
    """
    for name, advice in instead.items():
        if name in options:
            kind = type(optimizer).__name__
            raise TypeError(f"{kind} sets {name}= itself, but got {name}={options[name]!r}; {advice}")


def _build(factory: Callable[..., Optimizer], params: Any, kwargs: dict[str, Any], name: str, usage: str) -> Optimizer:
    """Return the base that a class or factory makes.

    Raises:
        TypeError: If it does not take an argument, or makes something else than an optimizer.
    """
    base_name = getattr(factory, "__name__", type(factory).__name__)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of a callable without one
        signature = None
    if signature is not None and not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        unknown = [key for key in kwargs if key not in signature.parameters]
        if unknown:
            raise TypeError(
                f"{name} does not know {', '.join(f'{key}=' for key in unknown)}, and neither does {base_name}; "
                f"help(samopt.{name}) lists the options, and {base_name} takes {', '.join(signature.parameters)}"
            )
    try:
        base = factory(params, **kwargs)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise type(error)(f"{name} could not make its base, {base_name}({given}): {error}") from error
    if not isinstance(base, Optimizer):
        raise TypeError(f"{name} needs an optimizer, but {base_name} returned {type(base).__name__}; {usage}")
    _refuse_wrapper(base, name, usage)
    return base


def as_group(param_group: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a group, and their names if it has them, as torch will put them into the group.

    Args:
        param_group: What a user gives to ``add_param_group``; a generator of parameters in it becomes a list.
    """
    params = param_group["params"]
    if isinstance(params, Tensor):
        params = [params]
    elif not isinstance(params, list | tuple | set):
        params = param_group["params"] = list(params)  # a generator can be read only once
    if params and all(isinstance(each, tuple) for each in params):
        return {"params": [p for _, p in params], "param_names": [name for name, _ in params]}
    return {**param_group, "params": params}


def _refuse_wrapper(base: Optimizer, name: str, usage: str) -> None:
    """Raise if an optimizer makes two passes already: this package's, or a script's with the same methods."""
    inner = getattr(base, "base_optimizer", None)
    if isinstance(inner, Optimizer) and hasattr(base, "first_step"):
        raise TypeError(
            f"{name} cannot wrap {type(base).__name__}, which already wraps {type(inner).__name__}; wrap "
            f"that optimizer instead: {usage}"
        )
