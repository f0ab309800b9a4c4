"""Which optimizer follows a model's calls, where several were made over the same weights."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from samopt._callers.user_warnings import warn_user

__all__ = ["enlist", "replace_older"]


class _Follower(Protocol):
    @property
    def is_attached(self) -> bool:
        """Whether it follows the calls of a model, or will once its optimizer is used again."""

    def detach(self) -> None:
        """Follow the calls of a model no longer."""

    def retire(self) -> None:
        """Follow them no longer, until the optimizer is used again."""


_followers: Any = WeakTensorKeyDictionary()
"""For each weight, a weak reference to what follows the calls of its model."""


def enlist(follower: _Follower, parameters: Sequence[Tensor]) -> None:
    """Note who follows the calls of a model, and end the work of older ones over the same weights, with a warning.

    Args:
        follower: What follows them.
        parameters: The weights of its optimizer.
    """
    _follow_new_optimizers()
    replace_older(parameters)
    reference = weakref.ref(follower)
    for parameter in parameters:
        _followers[parameter] = reference


def replace_older(parameters: Sequence[Tensor]) -> None:
    """End the work of older followers over some weights, with a warning: another samopt optimizer replaces them.

    Args:
        parameters: The weights.
    """
    older = _over(parameters)
    were_attached = any([each.is_attached for each in older])
    for each in older:
        each.detach()
    for parameter in parameters:
        _followers.pop(parameter, None)
    if were_attached:
        warn_user(
            "a samopt optimizer was made over weights that an older one in one-pass form follows; the older one no "
            "longer perturbs the model. Delete it, or call its detach(), before you make the next one"
        )


def _over(parameters: Iterable[Any]) -> list[_Follower]:
    """Return the followers over some weights, each once."""
    found = {}
    for parameter in parameters:
        reference = _followers.get(parameter) if isinstance(parameter, Tensor) else None
        follower = None if reference is None else reference()
        if follower is not None:
            found[id(follower)] = follower
    return list(found.values())


@functools.cache
def _follow_new_optimizers() -> None:
    """Have every optimizer that is made from now on retire the followers over its weights.

    An optimizer of an earlier stage may live on while a plain one trains the same model. torch has no hook for the
    making of an optimizer, so its method is wrapped, once, and only where a model's calls are followed at all.
    """
    original = Optimizer.add_param_group

    @functools.wraps(original)
    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        original(self, param_group)
        for follower in _over(self.param_groups[-1]["params"] if self.param_groups else ()):
            follower.retire()

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]  # see above
